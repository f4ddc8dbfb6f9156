"""`kvstore serve`: a process that receives, lets engines attach, tells how it goes, and drains when asked to stop."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import kvstore
from kvstore.abc import TransportOptions
from kvstore.cli.main import app
from kvstore.errors import OwnerGoneError, PeerClosingError, PeerMismatchError, QuotaTooSmallError, TransferError
from kvstore.spec import Shard, save_spec
from kvstore.testing.resources import leaves_nothing
from tests.integration.serve_process import ROOT, ServeProcess, serving
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    WITHIN_S,
    assert_same,
    match_all,
    prompt,
    put_layer,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HELD = TransportOptions(pacing_bytes_per_s=64 << 10)
"""It would take half a minute: no test waits for its end."""


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        store_prompt(store, prompt(BIG_TOKENS))
        yield store


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    save_spec(tiny_spec(BIG_WIDTH), tmp_path / "model.json")
    return ["--spec", str(tmp_path / "model.json"), "--dram", "32MiB", "--listen", "tcp://127.0.0.1:0"]


def begin(source: kvstore.Store, node: ServeProcess) -> Any:
    """A transfer that would take half a minute, and has begun."""
    handle = source.send(match_all(source, prompt(BIG_TOKENS)), node.address, transport=HELD)
    wait_until(lambda: arriving(node) == 1, "the transfer has begun")
    return handle


def arriving(node: ServeProcess) -> int:
    return len(json.loads(node.get("/status")[1])["receiving"][0]["transfers"])


def serving_status(node: ServeProcess) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(node.get("/status")[1])["serving"][0]
    return status


def test_a_node_receives_tells_and_serves_its_host(source: kvstore.Store, arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    path = tmp_path / "pool.sock"
    with serving(*arguments, "--socket", str(path)) as node:
        node.wait_ready()
        assert node.metric("kvstore_receive_transfers_total") == 0
        with kvstore.attach(path, deadline_s=WITHIN_S) as engine:
            report = source.send(match_all(source, prompt(BIG_TOKENS)), node.address).result(WITHIN_S)
            assert_same(source, engine, prompt(BIG_TOKENS), BIG_TOKENS)
            assert node.metric("kvstore_attached_processes") == 1
        assert node.metric("kvstore_receive_transfers_total") == 1
        assert node.metric("kvstore_receive_bytes_total") == report.total_bytes
        assert node.metric("kvstore_pool_used_bytes") > report.total_bytes
        line = node.event("transfer_committed")
        assert (line["transfer"], line["bytes"]) == (str(report.transfer), report.total_bytes)
        status = json.loads(node.get("/status")[1])
        assert status["spec"]["fingerprint"] == source.spec.fingerprint.hex()
        assert status["pool"]["commits"] == 1
        engine = kvstore.attach(path)
        node.terminate(signal.SIGINT)
        assert node.exit_status() == 0
        with pytest.raises(OwnerGoneError):
            engine.match(prompt(20))
        engine.close()
        events = [line["event"] for line in node.lines if "event" in line]
    assert events[:5] == ["starting", "http", "opened", "listening", "ready"]
    assert events[-4:] == ["signal", "draining", "drained", "closed"]


def test_a_node_with_a_disk_has_its_cache_again(source: kvstore.Store, arguments: list[str], tmp_path: Path) -> None:
    """What came by transfer, and what an engine of its host wrote, is there after a stop; quotas hold for engines."""
    path = tmp_path / "pool.sock"
    ids = prompt(40, seed=3)
    more = ["--socket", str(path), "--ssd", f"{tmp_path}/a:1GiB", "--ssd", f"{tmp_path}/b:1GiB"]
    with serving(*arguments, *more, "--set", "limits.quota=4MiB") as node:
        node.wait_ready()
        assert node.event("opened")["ssd"] == f"{tmp_path}/a:1GiB, {tmp_path}/b:1GiB"
        source.send(match_all(source, prompt(BIG_TOKENS)), node.address).result(WITHIN_S)
        with kvstore.attach(path, deadline_s=WITHIN_S) as engine:
            store_prompt(engine, ids)
            engine.flush(WITHIN_S)
            with pytest.raises(QuotaTooSmallError):
                engine.write(prompt(3 * BIG_TOKENS, seed=4))
        node.terminate()
        assert node.exit_status() == 0
    with serving(*arguments, *more) as node:
        node.wait_ready()
        with kvstore.attach(path, deadline_s=WITHIN_S) as engine:
            found = engine.match([*ids, 1])
            assert (found.tokens, found.tier) == (40, "ssd")
            assert found.best is not None
            assert found.best.is_durable
            assert_same(source, engine, prompt(BIG_TOKENS), BIG_TOKENS)
        assert json.loads(node.get("/status")[1])["pool"]["shelves"][0]["loaded_bytes"] > 0
        with serving(*arguments, *more[2:]) as other:
            assert other.exit_status() == 3
            assert "in use by process" in other.event("failed")["message"]


def test_what_runs_ends_during_a_drain(source: kvstore.Store, arguments: list[str]) -> None:
    ids = prompt(40, seed=1)
    with serving(*arguments) as node, source.write(ids) as writer:
        handle = writer.send(node.address)
        put_layer(writer, 1, 0, 40, [], 1, Shard())
        wait_until(lambda: arriving(node) == 1, "the transfer has begun")
        node.terminate()
        node.event("draining")
        assert node.get("/readyz") == (503, "draining\n")
        assert node.get("/healthz")[0] == 200
        with pytest.raises(PeerClosingError, match="draining"):
            source.send(match_all(source, prompt(BIG_TOKENS)), node.address).result(WITHIN_S)
        for layer in (0, 2, 3, 4):
            put_layer(writer, layer, 0, 40, [40], 1, Shard())
        writer.commit()
        report = handle.result(WITHIN_S)
        assert node.exit_status() == 0
        assert node.event("transfer_committed")["bytes"] == report.total_bytes


def test_an_engine_fetches_from_another_node(source: kvstore.Store, arguments: list[str], tmp_path: Path) -> None:
    """Two nodes; an engine of the second one's host pulls what the first one has, for all engines of that host."""
    pytest.importorskip("prometheus_client")
    path = tmp_path / "pool.sock"
    ids = prompt(BIG_TOKENS)
    with serving(*arguments) as far, serving(*arguments, "--socket", str(path)) as near:
        source.send(match_all(source, ids), far.address).result(WITHIN_S)
        near.wait_ready()
        with kvstore.attach(path, deadline_s=WITHIN_S) as engine, kvstore.attach(path) as neighbour:
            report = engine.fetch([*ids, 1], far.address).result(WITHIN_S)
            assert report.tokens == BIG_TOKENS
            for reader in (engine, neighbour):
                assert_same(source, reader, ids, BIG_TOKENS)
        # The requester knows of its commit before the node that served it has read so.
        wait_until(lambda: far.metric("kvstore_serve_fetches_total") == 1, "the fetch has ended there, too")
        assert far.metric("kvstore_serve_bytes_total") == report.received_bytes
        assert far.metric("kvstore_serve_queries_total") == far.metric("kvstore_serve_hits_total") == 1
        assert far.metric("kvstore_serve_active_fetches") == 0
        assert far.event("fetch_served")["bytes"] == report.received_bytes
        assert serving_status(far)["statistics"]["served"] == 1


def test_a_drain_waits_for_fetches(source: kvstore.Store, arguments: list[str]) -> None:
    """One that runs may end; a new one is refused by name; one that does not end is cut."""
    paced = ["--set", "transport.pacing_bytes_per_s=64KiB", "--drain-s", "3600"]
    ids = prompt(BIG_TOKENS)
    with (
        serving(*arguments, *paced) as node,
        kvstore.open(tiny_spec(BIG_WIDTH), dram="32MiB") as here,
        kvstore.open(tiny_spec(BIG_WIDTH), dram="32MiB") as other,
    ):
        source.send(match_all(source, ids), node.address).result(WITHIN_S)
        fetching = here.fetch([*ids, 1], node.address)
        wait_until(lambda: serving_status(node)["transfers"] == 1, "the fetch has begun")
        node.terminate()
        assert node.event("draining")["transfers"] == 1
        with pytest.raises(PeerClosingError, match="draining"):
            other.fetch([*ids, 1], node.address).result(WITHIN_S)
        assert not fetching.done()
        node.terminate()
        with pytest.raises(PeerClosingError):
            fetching.result(WITHIN_S)
        assert node.exit_status() == 1
        assert "closing" in node.event("fetch_failed")["reason"]


def test_a_node_may_only_receive(source: kvstore.Store, arguments: list[str]) -> None:
    with serving(*arguments, "--no-serves") as node:
        source.send(match_all(source, prompt(BIG_TOKENS)), node.address).result(WITHIN_S)
        with (
            kvstore.open(tiny_spec(BIG_WIDTH), dram="32MiB") as here,
            pytest.raises(TransferError, match="listens with serves=True"),
        ):
            here.fetch([*prompt(BIG_TOKENS), 1], node.address).result(WITHIN_S)


def test_a_peer_with_another_model_is_in_the_log(arguments: list[str]) -> None:
    with serving(*arguments) as node, kvstore.open(tiny_spec(BIG_WIDTH, "sha256:other"), dram="8MiB") as other:
        store_prompt(other, prompt(40))
        for _ in range(2):
            with pytest.raises(PeerMismatchError):
                other.send(match_all(other, prompt(40)), node.address).result(WITHIN_S)
        line = node.event("peer_refused")
        assert line["level"] == "warning"
        assert other.spec.fingerprint.hex()[:16] in line["reason"]
        wait_until(lambda: json.loads(node.get("/status")[1])["receiving"][0]["statistics"]["refused"] == 2, "both")
        assert sum(each.get("event") == "peer_refused" for each in node.lines) == 1


def test_what_does_not_end_in_time_is_cut(source: kvstore.Store, arguments: list[str]) -> None:
    with serving(*arguments, "--drain-s", "0.2") as node:
        handle = begin(source, node)
        node.terminate()
        with pytest.raises(PeerClosingError, match="closing"):
            handle.result(WITHIN_S)
        assert node.exit_status() == 1
        assert node.event("cut")["transfers"] == 1
        assert node.event("transfer_aborted")["code"] == "closing"


def test_a_second_signal_ends_the_wait(source: kvstore.Store, arguments: list[str]) -> None:
    with serving(*arguments, "--drain-s", "3600") as node:
        handle = begin(source, node)
        node.terminate()
        node.event("draining")
        node.terminate(signal.SIGINT)
        with pytest.raises(PeerClosingError):
            handle.result(WITHIN_S)
        assert node.exit_status() == 1


def test_settings_from_a_file_and_a_supervisor(arguments: list[str], tmp_path: Path) -> None:
    """Two addresses, limits from the file, and systemd hears of start and stop."""
    file = tmp_path / "node.toml"
    file.write_text(
        f'spec = "{arguments[1]}"\ndram = "32MiB"\nlisten = ["tcp://localhost:0", "tcp://127.0.0.1:0"]\n'
        "[transfer]\ntransfers_per_node_max = 1\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(WITHIN_S)
        with serving("--config", str(file), NOTIFY_SOCKET=str(tmp_path / "notify")) as node:
            assert supervisor.recv(100) == b"READY=1"
            node.wait_ready()
            node.event("ready")  # written after the lines that are looked for
            addresses = [line["address"] for line in node.lines if line.get("event") == "listening"]
            assert len(addresses) == 2
            for seed, address in enumerate(addresses):
                with kvstore.open(tiny_spec(BIG_WIDTH), dram="8MiB") as store:
                    store_prompt(store, prompt(40, seed=seed))
                    assert store.send(match_all(store, prompt(40, seed=seed)), address).result(WITHIN_S).tokens == 40
            node.terminate()
            assert supervisor.recv(100) == b"STOPPING=1"
            assert node.exit_status() == 0


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--spec", "/nonexistent/model.json"], 2, "the spec file /nonexistent/model.json cannot be read"),
        (["--listen", "tcp://localhost"], 2, "'tcp://localhost' is not a TCP address"),
        (["--listen", "IN USE"], 3, "the port is in use; stop its user"),
    ],
)
def test_a_node_that_cannot_start_says_why(arguments: list[str], more: list[str], status: int, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        more = [text.replace("IN USE", f"tcp://127.0.0.1:{taken.getsockname()[1]}") for text in more]
        with serving(*arguments, *more) as node:
            assert node.exit_status() == status
            assert message in " ".join(str(line["message"]) for line in node.lines)
            assert not any("Traceback" in str(line) for line in node.lines)


def test_an_error_that_nobody_foresaw_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("kvstore.cluster.node.open_store", fail)
    try:
        done = CliRunner().invoke(app, ["serve", *arguments, "--http", "", "--log-format", "json"])
    finally:
        logging.getLogger("kvstore").handlers.clear()
        logging.getLogger("kvstore").propagate = True
        logging.getLogger("kvstore").setLevel(logging.NOTSET)
    assert done.exit_code == 3
    line = json.loads(done.stderr.splitlines()[-1])
    assert (line["event"], line["error"]) == ("failed", "OSError")
    assert "Too many open files" in line["message"]
    assert "Traceback" in line["exception"]


def test_a_log_that_nobody_reads_any_more(source: kvstore.Store, arguments: list[str]) -> None:
    """Its pipe is closed at the other end: the node goes on, and ends as it should."""
    node = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "serve", "--log-format", "json", "--http", "", *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    try:
        assert node.stderr is not None
        line: dict[str, Any] = {}
        address = ""
        while line.get("event") != "ready":
            line = json.loads(node.stderr.readline())
            address = address or str(line.get("address", ""))
        node.stderr.close()
        for seed in (1, 2):
            ids = prompt(40, seed=seed)
            store_prompt(source, ids)
            assert source.send(match_all(source, ids), address).result(WITHIN_S).tokens == 40
        node.send_signal(signal.SIGTERM)
        assert node.wait(WITHIN_S) == 0
    finally:
        node.kill()
        node.wait(WITHIN_S)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "x", "--listen", "tcp://0.0.0.0:0"], "whoever can reach the port can read and write the cache"),
        (["--set", "tls.certificate=x"], "command line: tls is not there yet"),
        (["--config", "/nonexistent.toml"], "the configuration /nonexistent.toml cannot be read"),
        (["--set", "drain_s"], "is not KEY=VALUE"),
        ([], "no spec file is named"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("kvstore serve: ")
    assert message in done.stderr


def test_a_killed_node_is_in_nobodys_way(arguments: list[str], tmp_path: Path) -> None:
    more = ["--socket", str(tmp_path / "pool.sock"), "--set", f"attach.arena=test-serve-{os.getpid()}"]
    with serving(*arguments, *more) as node:
        node.wait_ready()
        node.terminate(signal.SIGKILL)
        assert node.exit_status() == -signal.SIGKILL
    # Beyond loopback, since it is told so.
    with serving(*arguments, *more, "--listen", "tcp://0.0.0.0:0", "--trust-network") as node:
        node.wait_ready()
        assert node.address.startswith("tcp://0.0.0.0:")
        node.terminate()
        assert node.exit_status() == 0
