"""A node: one pool that other machines send to, and the processes of its host attach to."""

from __future__ import annotations

import enum
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from kvstore._version import __version__
from kvstore.clock import Deadline
from kvstore.cluster.exposure import check_exposure
from kvstore.cluster.health import health_routes
from kvstore.cluster.http import HttpServer
from kvstore.cluster.logs import log_event
from kvstore.cluster.snapshot import NodeSnapshot, ReceiverSnapshot
from kvstore.errors import AddressError, ConfigError
from kvstore.registry import transport_for
from kvstore.spec import ModelSpec, load_spec
from kvstore.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.cluster.config import NodeConfig
    from kvstore.store import Store
    from kvstore.transfer import Endpoint

LOG = logging.getLogger("kvstore.node")
DRAIN_POLL_S = 0.1
"""How soon a drain notices that it is to end early."""


class NodeState(enum.Enum):
    """What `/readyz` answers; ready is the only one with status 200."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"


class Node:
    """Opens a pool and serves it until it is closed. Any thread may call; a context manager.

        with Node(NodeConfig(spec="model.json", dram=8 << 30)) as node:
            node.addresses  # ("tcp://127.0.0.1:7400",)

    The constructor returns when the node is ready. The health endpoint answers before that, and until the very end.

    Attributes:
        config: what it was started with.

    Raises:
        SpecError: the spec file cannot be used.
        AddressError: an address is in use, or not of this machine.
        ArenaError, RecordTooLargeError: the memory cannot be had, or is too small.
        AttachError: another owner has the socket.
        ConfigError: an address in `listen` is malformed, or a name turned out to be no loopback address.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._state = NodeState.STARTING
        self._started_at_s = time.time()
        self._started_s = time.monotonic()
        self._http: HttpServer | None = None
        self._store: Store | None = None
        self._endpoints: tuple[Endpoint, ...] = ()
        self._closing = ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Node({', '.join(self.addresses)}, {self._state.value})"

    @property
    def state(self) -> NodeState:
        return self._state

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where other nodes connect, with the real ports."""
        return tuple(endpoint.address for endpoint in self._endpoints)

    @property
    def http_address(self) -> str | None:
        """`http://host:port` of health and metrics, with the real port; None without."""
        return None if self._http is None else self._http.address

    @property
    def store(self) -> Store:
        """The pool's store, as `kvstore.open` returns it; the node closes it."""
        assert self._store is not None, "a node has its store from its constructor on"
        return self._store

    @property
    def transfer_count(self) -> int:
        """Transfers that arrive or leave now, those that peers fetch included."""
        sender = None if self._store is None else self._store.sender
        with_peers = sum(endpoint.transfer_count + endpoint.served_count for endpoint in self._endpoints)
        return with_peers + (0 if sender is None else sender.transfer_count)

    def snapshot(self) -> NodeSnapshot:
        """What it is doing."""
        node = NodeSnapshot(
            state=self._state.value,
            version=__version__,
            pid=os.getpid(),
            started_at_s=self._started_at_s,
            uptime_s=time.monotonic() - self._started_s,
        )
        store = self._store
        if store is None:
            return node
        sender = store.sender
        return replace(
            node,
            model=store.spec.model,
            weights=store.spec.weights,
            fingerprint=store.spec.fingerprint.hex(),
            block_tokens=store.spec.block_tokens,
            store=store.metrics(),
            attached_processes=store.attached_process_count,
            receivers=tuple(_receiver(endpoint) for endpoint in self._endpoints),
            sending=0 if sender is None else sender.transfer_count,
            sent=None if sender is None else sender.statistics(),
            links=store.links(),
        )

    def _start(self) -> None:
        config = self.config
        log_event(
            LOG, logging.INFO, "starting", f"kvstore {__version__} is starting", version=__version__, pid=os.getpid()
        )
        spec = config.spec if isinstance(config.spec, ModelSpec) else load_spec(config.spec)
        if config.http.listen:
            routes = health_routes(lambda: self._state.value, self.snapshot)
            self._http = self._closing.enter_context(HttpServer(config.http.listen, routes))
            self._check_bound(self._http.address)
            log_event(LOG, logging.INFO, "http", "health and metrics are there", address=self._http.address)
        self._check_addresses()
        attach = config.attach
        self._store = self._closing.enter_context(
            open_store(
                spec,
                dram=config.dram,
                ssd=config.ssd_options(),
                socket=attach.socket,
                arena=attach.arena,
                allow_uids=attach.allow_uids,
                silence_s=attach.silence_s,
                verify=attach.verify,
                limits=config.limits.store_limits(),
            )
        )
        log_event(
            LOG,
            logging.INFO,
            "opened",
            f"the pool of {spec.model} is open",
            fingerprint=spec.fingerprint.hex(),
            bytes=config.dram,
            ssd=", ".join(config.ssd) or "none",
            socket=attach.socket or "none",
        )
        for address in config.listen:
            endpoint = self._store.listen(
                address, transport=config.transport.options(), settings=config.transfer, serves=config.serves
            )
            self._endpoints = (*self._endpoints, endpoint)
            self._check_bound(endpoint.address)
            log_event(
                LOG, logging.INFO, "listening", "transfers may come", address=endpoint.address, serves=config.serves
            )
        self._state = NodeState.READY
        log_event(LOG, logging.INFO, "ready", "the node takes work")

    def _check_addresses(self) -> None:
        """Find what is written wrongly, or in use, before memory is allocated, which may take minutes."""
        options = self.config.transport.options()
        for address in self.config.listen:
            transport = transport_for(address)
            try:
                transport.routes(address, options)
            except AddressError as error:
                raise ConfigError(f"listen = {error}") from error
            transport.listen(address, options).close()

    def _check_bound(self, address: str) -> None:
        """A name was resolved meanwhile; what counts is where the socket is."""
        check_exposure((address,), "", trust_network=self.config.trust_network)

    def drain(self, deadline_s: float | None = None, *, should_end: Callable[[], bool] = lambda: False) -> bool:
        """Refuse new transfers and let those that run end; `/readyz` answers 503 from here on. Follow it with `close`.

        Args:
            deadline_s: how long they may take; the configuration's `drain_s` by default.
            should_end: asked now and then; True ends the wait before its deadline.

        Returns:
            Whether every transfer has ended by itself.
        """
        deadline = Deadline.after(self.config.drain_s if deadline_s is None else deadline_s)
        self._state = NodeState.DRAINING
        log_event(
            LOG,
            logging.INFO,
            "draining",
            "nothing new is taken",
            transfers=self.transfer_count,
            seconds=round(deadline.remaining_s(), 3),
        )
        # All of them refuse before any is waited for.
        is_drained = [endpoint.drain(0.0) for endpoint in self._endpoints]
        while not all(is_drained) or self.transfer_count:
            if deadline.has_passed or should_end():
                log_event(LOG, logging.WARNING, "cut", "what still runs is given up", transfers=self.transfer_count)
                return False
            wait_s = min(DRAIN_POLL_S, deadline.remaining_s()) / max(1, len(self._endpoints))
            is_drained = [endpoint.drain(wait_s) for endpoint in self._endpoints]
            if all(is_drained):
                time.sleep(wait_s)
        log_event(LOG, logging.INFO, "drained", "every transfer has ended")
        return True

    def close(self) -> None:
        """Give up what runs, part from attached processes, free memory and addresses. Idempotent."""
        was_open = self._state is not NodeState.CLOSED
        self._state = NodeState.CLOSED
        self._closing.close()
        if was_open:
            log_event(LOG, logging.INFO, "closed", "the node is closed")


def _receiver(endpoint: Endpoint) -> ReceiverSnapshot:
    refused = endpoint.last_error
    return ReceiverSnapshot(
        address=endpoint.address,
        connections=endpoint.connection_count,
        transfers=tuple(endpoint.transfers()),
        statistics=endpoint.statistics(),
        fetches=endpoint.served_count,
        serving=endpoint.serving_statistics(),
        last_refused=None if refused is None else (refused[0], str(refused[1])),
    )
