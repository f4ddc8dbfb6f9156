"""A node from Python: its states, what it leaves behind when it cannot start, and its drain."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore.abc import TransportOptions
from kvstore.cluster import AttachConfig, HttpConfig, Node, NodeConfig, NodeState, TransportConfig
from kvstore.errors import (
    AddressError,
    AttachError,
    ConfigError,
    PeerClosingError,
    RecordTooLargeError,
    SpecError,
    TransferError,
    UnavailableError,
)
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.transfer import TransferSettings
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    WITHIN_S,
    assert_same,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPEC = tiny_spec(BIG_WIDTH)
QUIET = HttpConfig("")
ANY = ("tcp://127.0.0.1:0",)
HELD = TransportOptions(pacing_bytes_per_s=64 << 10)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def config(**settings: Any) -> NodeConfig:
    return NodeConfig(**{"spec": SPEC, "dram": "32MiB", "listen": ANY, "http": QUIET, **settings})


def readiness(address: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=WITHIN_S)) as connection:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_readiness_follows_the_node(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvstore")
    may_open = threading.Event()

    def open_later(*arguments: Any, **options: Any) -> kvstore.Store:
        assert may_open.wait(WITHIN_S)
        return kvstore.open(*arguments, **options)

    monkeypatch.setattr("kvstore.cluster.node.open_store", open_later)
    starting = Background(lambda: Node(config(http=HttpConfig("127.0.0.1:0"))))

    def http_address() -> str | None:
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        return next((each["address"] for each in fields if each.get("event") == "http"), None)

    wait_until(lambda: http_address() is not None, "the health endpoint is there")
    address = http_address()
    assert address is not None
    assert readiness(address) == (503, b"starting\n")
    may_open.set()
    with starting.result(WITHIN_S) as node:
        assert node.http_address == address
        assert (node.state, readiness(address)) == (NodeState.READY, (200, b"ready\n"))
        assert node.drain()
        assert (node.state, readiness(address)) == (NodeState.DRAINING, (503, b"draining\n"))
    assert repr(node) == f"Node({node.addresses[0]}, closed)"
    assert node.snapshot().state == "closed"
    with pytest.raises(ConnectionRefusedError):
        readiness(address)


def test_it_receives_and_its_store_finds(tmp_path: Path) -> None:
    with (
        kvstore.open(SPEC, dram="32MiB") as source,
        Node(config(attach=AttachConfig(str(tmp_path / "pool.sock")))) as node,
        kvstore.attach(tmp_path / "pool.sock") as engine,
    ):
        store_prompt(source, prompt(40))
        source.send(match_all(source, prompt(40)), node.addresses[0]).result(WITHIN_S)
        assert_same(source, node.store, prompt(40), 40)
        assert_same(source, engine, prompt(40), 40)
        snapshot = node.snapshot()
        assert snapshot.attached_processes == 1
        assert snapshot.receivers[0].statistics.committed == 1
        # It sends, too: what it has received goes on to the first one's own address.
        onward = source.listen("tcp://127.0.0.1:0")
        node.store.send(match_all(node.store, prompt(40)), onward.address).result(WITHIN_S)
        wait_until(lambda: node.transfer_count == 0, "the sender has taken note")
        sent = node.snapshot().sent
        assert sent is not None
        assert sent.committed == 1
        assert 0.0 < sent.exposed_s <= sent.sent_s
        (link,) = node.snapshot().document()["links"]
        assert (link["peer_address"], link["transfers"]) == (onward.address, 1)
        json.dumps(link)


def test_a_drain_waits_for_what_leaves_and_what_arrives() -> None:
    with (
        kvstore.open(SPEC, dram="32MiB") as other,
        Node(config(listen=("tcp://127.0.0.1:0", "tcp://127.0.0.2:0"))) as node,
    ):
        store_prompt(other, prompt(BIG_TOKENS))
        arriving = other.send(match_all(other, prompt(BIG_TOKENS)), node.addresses[1], transport=HELD)
        wait_until(lambda: node.transfer_count == 1, "one arrives")
        store_prompt(node.store, prompt(BIG_TOKENS, seed=1), seed=1)
        onward = other.listen("tcp://127.0.0.1:0")
        leaving = node.store.send(match_all(node.store, prompt(BIG_TOKENS, seed=1)), onward.address, transport=HELD)
        wait_until(lambda: node.transfer_count == 2, "one leaves")
        assert not node.drain(0.05)
        draining = Background(lambda: node.drain(WITHIN_S))
        for ending, left in ((arriving, 1), (leaving, 0)):
            assert draining.is_running
            ending.cancel()
            wait_until(lambda left=left: node.transfer_count == left, "one has ended")  # type: ignore[misc]
        assert draining.result(WITHIN_S)
        with pytest.raises(PeerClosingError):
            other.send(match_all(other, prompt(BIG_TOKENS)), node.addresses[0]).result(WITHIN_S)


def test_a_drain_ends_early_when_told_to() -> None:
    with kvstore.open(SPEC, dram="32MiB") as other, Node(config(drain_s=3600.0)) as node:
        store_prompt(other, prompt(BIG_TOKENS))
        handle = other.send(match_all(other, prompt(BIG_TOKENS)), node.addresses[0], transport=HELD)
        wait_until(lambda: node.transfer_count == 1, "it has begun")
        asked: list[bool] = []
        assert not node.drain(should_end=lambda: bool(asked) or bool(asked.append(True)))
        assert node.transfer_count == 1
        node.close()
        with pytest.raises(PeerClosingError):
            handle.result(WITHIN_S)


def test_what_is_wrong_is_found_before_memory_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.cluster.node.open_store", lambda *_, **__: pytest.fail("memory was allocated"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases: list[tuple[type[Exception], dict[str, Any]]] = [
            (ConfigError, {"listen": ("tcp://127.0.0.1",)}),
            (AddressError, {"listen": (*ANY, f"tcp://127.0.0.1:{taken.getsockname()[1]}")}),
            (UnavailableError, {"transport": TransportConfig("nonsense")}),
        ]
        for error, settings in cases:
            with leaves_nothing(), pytest.raises(error):
                Node(config(**settings))


def test_an_entry_with_several_addresses_is_one_listener_with_one_set_of_limits() -> None:
    with (
        Node(
            config(listen=("tcp://127.0.0.1:0,127.0.0.2:0",), transfer=TransferSettings(transfers_per_node_max=1))
        ) as node,
        kvstore.open(SPEC, dram="32MiB") as source,
    ):
        (address,) = node.addresses
        first, second = (f"tcp://{each}" for each in address.removeprefix("tcp://").split(","))
        assert second.startswith("tcp://127.0.0.2:")
        store_prompt(source, prompt(BIG_TOKENS))
        store_prompt(source, prompt(40, seed=1), seed=1)
        running = source.send(match_all(source, prompt(BIG_TOKENS)), first, transport=HELD)
        wait_until(lambda: node.transfer_count == 1, "it has begun")
        with pytest.raises(TransferError, match="1 transfers are under way at this node"):
            source.send(match_all(source, prompt(40, seed=1)), second).result(WITHIN_S)
        running.cancel()
        wait_until(lambda: node.transfer_count == 0, "it has ended")
        assert source.send(match_all(source, prompt(40, seed=1)), second).result(WITHIN_S).tokens == 40


def test_what_cannot_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Node(config(http=HttpConfig("127.0.0.1:0"), attach=AttachConfig(str(tmp_path / "pool.sock")))) as node:
        assert node.http_address is not None
        taken = node.http_address.removeprefix("http://")
        cases: list[tuple[type[Exception], dict[str, Any]]] = [
            (AddressError, {"listen": (*ANY, node.addresses[0])}),
            (AddressError, {"http": HttpConfig(taken)}),
            (AttachError, {"attach": AttachConfig(str(tmp_path / "pool.sock"))}),
            (RecordTooLargeError, {"dram": 4096}),
            (SpecError, {"spec": str(tmp_path / "none.json")}),
        ]
        for error, settings in cases:
            with leaves_nothing(), pytest.raises(error):
                Node(config(**{"http": HttpConfig("127.0.0.1:0"), **settings}))
        # A name that is called localhost and is not.
        monkeypatch.setattr("kvstore.cluster.exposure.LOCAL_NAMES", ("localhost", "0.0.0.0"))
        trap = config(listen=("tcp://0.0.0.0:0",))
        monkeypatch.undo()
        with leaves_nothing(), pytest.raises(ConfigError, match="not a loopback address"):
            Node(trap)
