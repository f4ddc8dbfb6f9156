"""How the scheduler's half comes by its store: opened and owned here, or another process's."""

from __future__ import annotations

import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from contextlib import ExitStack
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
                folder = tempfile.mkdtemp(prefix="kvstore-vllm-")
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
        try:
            attach_store(self.socket, spec=spec, deadline_s=ATTACH_DEADLINE_S).close()
        except SpecError:
            raise
        except (KVStoreError, OSError) as error:
            logger.warning("no store at %s yet, so nothing is cached: %s", self.socket, error)
        self._access = StoreAccess(spec, again_s=config.attach_again_s)
        self._access.get(self.socket)

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


def _keys(store: Store) -> list[bytes]:
    """Everything that is kept, parents before their children."""
    with store.events(kinds=(Stored,), contents=True) as stream:
        return list(dict.fromkeys(key for each in stream.contents for key in each.keys))


def open_for(spec: ModelSpec, config: ConnectorConfig) -> SchedulerStore:
    """The store that the settings ask for."""
    return OwnedStore(spec, config) if config.is_owner else AttachedStore(spec, config)
