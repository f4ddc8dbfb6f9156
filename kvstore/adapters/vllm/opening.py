"""How the scheduler's half comes by its store: opened and owned here, or another process's."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.adapters.vllm.stores import StoreAccess, share, withdraw
from kvstore.errors import KVStoreError, SpecError
from kvstore.events import Stored
from kvstore.limits import ATTACH_DEADLINE_S
from kvstore.placement.ssd import SsdOptions
from kvstore.store import attach_store, open_store

if TYPE_CHECKING:
    from kvstore.adapters.vllm.config import ConnectorConfig
    from kvstore.spec import ModelSpec
    from kvstore.store import Store

logger = logging.getLogger(__name__)

VALUE_SHOWN = 200
FOLDER_PREFIX = "kvstore-vllm-"
FOLDER_LEFT_S = 60.0
"""A folder in which nobody has owned a socket for so long was left by an engine that was killed."""

_ANY_HOST = ("tcp://0.0.0.0:", "tcp://[::]:")


class SchedulerStore(ABC):
    """The scheduler's store, which may be gone for a time.

    Attributes:
        socket: where workers attach.
        address: where other instances reach it; empty if they do not.
        is_local: whether this process owns it, so that a question costs no message.
    """

    socket: str
    address: str
    is_local: bool

    @abstractmethod
    def get(self) -> Store | None:
        """The store; None while there is none. Does not wait."""

    @abstractmethod
    def failed(self, store: Store, error: BaseException) -> None:
        """An operation on a store failed. If that says that it is gone, it is looked for again."""

    @abstractmethod
    def clear(self) -> bool:
        """Forget everything that is kept; False if this process cannot."""

    @abstractmethod
    def close(self) -> None:
        """Close or detach. Idempotent."""


class OwnedStore(SchedulerStore):
    """A store that this process opens, for itself and the workers of its instance.

    Raises:
        As `kvstore.open` and `Store.listen`.
    """

    is_local = True

    def __init__(self, spec: ModelSpec, config: ConnectorConfig) -> None:
        with ExitStack() as undoing:
            if config.own_socket:
                self.socket = config.own_socket
            else:
                remove_left_folders(Path(tempfile.gettempdir()))
                folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX)
                undoing.callback(shutil.rmtree, folder, ignore_errors=True)
                self.socket = str(Path(folder) / "store.sock")
            self._store: Store | None = open_store(
                spec,
                dram=config.dram,
                ssd=SsdOptions(config.ssd, write_bytes_per_day=config.ssd_write_bytes_per_day) if config.ssd else None,
                limits=config.limits_config().store_limits(),
                socket=self.socket,
            )
            undoing.callback(self._store.close)
            endpoints = [self._store.listen(address, serves=True) for address in config.listen]
            share(self.socket, self._store)
            undoing.callback(withdraw, self.socket, self._store)
            self.address = config.address or (endpoints[0].address if endpoints else "")
            self._closing = undoing.pop_all()
        if not config.address and self.address.startswith(_ANY_HOST):
            logger.warning("others cannot reach %s; set address to what they connect to", self.address)
            self.address = ""

    def get(self) -> Store | None:
        store = self._store
        return None if store is None or store.is_closed else store

    def failed(self, store: Store, error: BaseException) -> None:
        """Nothing comes back of a store of this process."""

    def clear(self) -> bool:
        """Evict everything, from every tier."""
        store = self.get()
        if store is None:
            return False
        keys = _keys(store)
        for key in reversed(keys):  # children first: a block with children stays matched
            store.pool.evict(key)
        left = _keys(store)
        if left:
            logger.warning("%d of %d blocks are in use, and stay: the cache was not reset", len(left), len(keys))
        return not left

    def close(self) -> None:
        self._store = None
        self._closing.close()


class AttachedStore(SchedulerStore):
    """Another process's store, which may come late, go, and come back.

    Raises:
        SpecError: what is there now holds another model.
    """

    is_local = False

    def __init__(self, spec: ModelSpec, config: ConnectorConfig) -> None:
        self.socket = config.socket
        self.address = config.address
        self._access = StoreAccess(spec, again_s=config.attach_again_s, deadline_s=ATTACH_DEADLINE_S)
        self._access.get(self.socket)  # a store that is not there yet is logged, and looked for
        refused = self._access.refused
        if refused is not None:
            self._access.close()
            raise SpecError(f"{refused}{_what_differs(spec, self.socket)}") from refused

    def get(self) -> Store | None:
        return self._access.get(self.socket)

    def failed(self, store: Store, error: BaseException) -> None:
        self._access.failed(store, error)

    def clear(self) -> bool:
        """Not here: the store is others' as well."""
        logger.warning("the store at %s belongs to another process, and was not reset", self.socket)
        return False

    def close(self) -> None:
        self._access.close()


def remove_left_folders(parent: Path, *, now_s: float | None = None) -> int:
    """Remove this user's folders of sockets that are left of engines that were killed; how many.

    Who owns a socket holds the lock beside it as long as he lives.
    """
    removed = 0
    before_s = (time.time() if now_s is None else now_s) - FOLDER_LEFT_S
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # somebody lives in it, or it is gone already
            found = folder.lstat()
            if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or found.st_mtime > before_s:
                continue
            with ExitStack() as locked:
                for lock in folder.glob("*.lock"):
                    fcntl.flock(locked.enter_context(lock.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed += 1
    return removed


def _what_differs(spec: ModelSpec, socket: str) -> str:
    """For a message: in what another process's model is not this one."""
    try:
        with attach_store(socket, deadline_s=ATTACH_DEADLINE_S) as store:
            there = store.spec
    except (KVStoreError, OSError):
        return ""
    told = [
        f"{each.name} is {_shortened(getattr(there, each.name))} there and {_shortened(getattr(spec, each.name))} here"
        for each in fields(spec)
        if each.compare and getattr(there, each.name) != getattr(spec, each.name)
    ]
    return f" ({'; '.join(told)})"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_SHOWN else f"{text[:VALUE_SHOWN]}..."


def _keys(store: Store) -> list[bytes]:
    """Everything that is kept, parents before their children."""
    with store.events(kinds=(Stored,), contents=True) as stream:
        return list(dict.fromkeys(key for each in stream.contents for key in each.keys))


def open_for(spec: ModelSpec, config: ConnectorConfig) -> SchedulerStore:
    """The store that the settings ask for."""
    return OwnedStore(spec, config) if config.is_owner else AttachedStore(spec, config)
