"""Inside a child process: take requests from the parent, and never outlive it."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any, Protocol

from kvstore import KVStoreError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    from .arguments import Options

ORPHANED_STATUS = 3


class DemoError(Exception):
    """The demo cannot go on; the message is for the user."""


@dataclass(frozen=True)
class Request:
    """Call a method of the child's worker."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Progress:
    """How far a request has come: what is being done, and the share that is done, 0 to 1, if known."""

    what: str
    fraction: float | None


@dataclass(frozen=True)
class Result:
    """What the method returned."""

    value: Any


@dataclass(frozen=True)
class Failure:
    """The method raised. `is_expected`: the message says all, the traceback nothing more."""

    message: str
    details: str
    is_expected: bool


class Report(Protocol):
    """Tells the parent how far a request has come. Any thread."""

    def __call__(self, what: str, fraction: float | None = None) -> None: ...


class MakeWorker(Protocol):
    """Makes the object whose methods are called; it is closed at the end."""

    def __call__(self, options: Options, progress: Report) -> AbstractContextManager[Any]: ...


def serve(connection: Connection, options: Options, make_worker: MakeWorker) -> None:
    """Answer requests until the parent closes the connection. The parent alone handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="demo-parent-watch", daemon=True).start()

    lock = threading.Lock()

    def send(message: Progress | Result | Failure) -> None:
        # Transfer threads report progress too, and a pipe takes one message at a time.
        with lock:
            connection.send(message)

    def progress(what: str, fraction: float | None = None) -> None:
        send(Progress(what, fraction))

    try:
        with make_worker(options, progress) as worker:
            while True:
                request = connection.recv()
                send(Result(getattr(worker, request.method)(*request.arguments)))
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        is_expected = isinstance(error, KVStoreError | ModuleNotFoundError | DemoError)
        message = str(error) if isinstance(error, DemoError) else f"{type(error).__name__}: {error}"
        send(Failure(message, traceback.format_exc(), is_expected))
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a child of multiprocessing has a parent"
    parent.join()
    # Nobody is left to report to, and the main thread may be anywhere; the kernel closes ports and memory.
    os._exit(ORPHANED_STATUS)
