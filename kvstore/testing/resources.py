"""What a test must not leave behind, and threads whose failures are seen. Needs nothing but the standard library."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

SETTLE_S = 20.0
"""How long threads and descriptors may take to go away after a test, on a machine that is busy with others."""

_DESCRIPTORS = Path("/proc/self/fd")


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """Fail if the body leaves a thread or an open descriptor (the latter is seen on Linux only).

    Raises:
        AssertionError: something is left after `SETTLE_S`.
    """
    threads_before = set(threading.enumerate())
    descriptors_before = _open_descriptors()
    yield
    until_s = time.monotonic() + SETTLE_S
    while True:
        threads = [thread.name for thread in threading.enumerate() if thread not in threads_before]
        descriptors = _open_descriptors() - descriptors_before
        if not threads and not descriptors:
            return
        if time.monotonic() >= until_s:
            raise AssertionError(f"left behind: threads {threads}, descriptors {sorted(descriptors.elements())}")
        gc.collect()
        time.sleep(0.01)


def _open_descriptors() -> Counter[str]:
    """What the open descriptors point to: kinds for sockets and the like, whose numbers are new each time."""
    found: Counter[str] = Counter()
    if not _DESCRIPTORS.exists():
        return found
    for name in os.listdir(_DESCRIPTORS):
        try:
            target = os.readlink(_DESCRIPTORS / name)
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        found[target.partition(":[")[0]] += 1
    return found


class Background(Generic[T]):
    """A function running in a thread, whose value or exception `result` gives."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvstore-testing", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self, within_s: float) -> T:
        """Its value, or its exception raised.

        Raises:
            AssertionError: it has not ended after `within_s` seconds.
        """
        self._thread.join(within_s)
        if self._thread.is_alive():
            raise AssertionError(f"a call did not end within {within_s:g} s")
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def _run(self) -> None:
        try:
            self._outcome.append(self._function())
        except BaseException as error:
            self._error = error
