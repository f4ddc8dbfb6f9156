"""What whole transfers tell of their links and paths, over sockets and without."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest

import kvstore
import kvstore.transfer.path
import kvstore.transfer.path_watch
from kvstore.abc import TransportOptions
from kvstore.errors import PeerGoneError
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, LinkSnapshot, Sender, TransferSettings, send_lease
from kvstore.transfer.link import DATA_PATH_VARIABLE
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    WITHIN_S,
    address,
    assert_same,
    assert_settled,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
)
from transports.tcp.socket_options import choosable_congestion_controls

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = prompt(BIG_TOKENS)
SPEC = tiny_spec(BIG_WIDTH)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="32MiB") as store:
        store_prompt(store, IDS)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="32MiB") as store:
        yield store


@pytest.mark.parametrize("data_path", ["native", "python"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_transfer_over_tcp_says_how_its_link_is_doing(
    source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch, data_path: str, host: str
) -> None:
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"no IPv6 loopback here: {error}")
    monkeypatch.setenv(DATA_PATH_VARIABLE, data_path)
    # However slow this machine is at the moment, loopback counts as near.
    monkeypatch.setattr(kvstore.transfer.path, "NEAR_ROUND_TRIP_S", 60.0)
    assert source.links() == ()
    with target.listen(f"tcp://{host}:0") as endpoint:
        report = source.send(match_all(source, IDS), endpoint.address).result(WITHIN_S)
        (link,) = source.links()
    assert_same(source, target, IDS, BIG_TOKENS)
    expected = "cubic" if "cubic" in choosable_congestion_controls() else choosable_congestion_controls()[0]
    assert report.path.congestion_control == link.congestion_control == (expected,)
    assert report.path.connections == 1, "too few bytes for a second one"
    assert "near" in report.path.why
    assert report.path.limits == ()
    assert isinstance(link, LinkSnapshot)
    assert link.peer_address == endpoint.address
    assert (link.transfers, link.transfers_running, link.queued_bytes, link.in_flight_bytes) == (1, 0, 0, 0)
    assert link.sent_bytes >= report.total_bytes, "and what was said besides the pieces"
    assert link.exposed_s == link.exposed_total_s == pytest.approx(report.exposed_s)
    assert link.round_trip_s is not None
    assert link.delivery_bytes_per_s is not None
    assert link.delivery_bytes_per_s > 0
    assert link.age_s < WITHIN_S
    assert_settled(source, target)


def test_a_transport_that_cannot_tell_gives_bytes_and_times(source: kvstore.Store, target: kvstore.Store) -> None:
    with target.listen(address("memory")) as endpoint:
        report = source.send(match_all(source, IDS), endpoint.address).result(WITHIN_S)
        (link,) = source.links()
    assert link.sent_bytes == report.total_bytes
    assert (link.transfers, link.exposed_s) == (1, pytest.approx(report.exposed_s))
    assert link.round_trip_s is link.round_trip_min_s is link.retransmitted_share is None
    assert report.path.congestion_control == link.congestion_control == ()
    assert "round-trip time unknown" in report.path.why


def test_a_failed_transfer_counts_for_nothing(source: kvstore.Store) -> None:
    with Sender() as sender:
        lease = source.read(match_all(source, IDS))
        with pytest.raises(PeerGoneError):
            send_lease(lease, "tcp://127.0.0.1:1", sender=sender).result(WITHIN_S)
        (link,) = sender.links()
    assert (link.transfers, link.transfers_running, link.sent_bytes, link.round_trip_s) == (0, 0, 0, None)


@pytest.mark.skipif("bbr" not in choosable_congestion_controls(), reason="this process may not use bbr")
def test_a_far_path_uses_bbr(source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.transfer.path, "NEAR_ROUND_TRIP_S", 1e-9)
    with target.listen(address("tcp")) as endpoint:
        report = source.send(match_all(source, IDS), endpoint.address).result(WITHIN_S)
    assert report.path.congestion_control == ("bbr",)
    assert report.path.connections == 1
    assert "far: bbr" in report.path.why
    assert_same(source, target, IDS, BIG_TOKENS)


def test_a_far_path_without_bbr_uses_more_connections(
    source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.transfer.path, "NEAR_ROUND_TRIP_S", 1e-9)
    monkeypatch.setattr(kvstore.transfer.path, "FAR_CONGESTION_CONTROL", "none-of-these")
    monkeypatch.setattr(kvstore.transfer.path, "FAR_BYTES_PER_CONNECTION_MIN", 1)
    monkeypatch.setattr(kvstore.transfer.path_watch, "FRAME_BYTES_FIRST", 4096)
    monkeypatch.setattr(kvstore.transfer.path_watch, "FRAME_BYTES_MIN", 4096)
    monkeypatch.setattr(kvstore.transfer.path_watch, "FRAME_S", 0.0)
    slow = Slow()
    with Endpoint(target.pool, address("tcp"), settings=TransferSettings(credit_bytes=64 << 10), observer=slow) as to:
        report = source.send(match_all(source, IDS), to.address).result(WITHIN_S)
    assert 2 <= report.path.connections <= kvstore.transfer.path.LOSS_BOUND_CONNECTIONS_MAX
    assert "none-of-these is not to be had" in report.path.why
    assert_same(source, target, IDS, BIG_TOKENS)
    assert_settled(source, target)


def test_what_the_user_chooses_is_used(source: kvstore.Store, target: kvstore.Store) -> None:
    with target.listen(address("tcp")) as endpoint, Sender(settings=TransferSettings(connections=1)) as sender:
        lease = source.read(match_all(source, IDS))
        options = TransportOptions(congestion_control="reno")
        report = send_lease(lease, endpoint.address, transport=options, sender=sender).result(WITHIN_S)
    assert (report.path.connections, report.path.congestion_control) == (1, ("reno",))
    assert "reno as asked" in report.path.why
    assert "1 connections as asked" in report.path.why


class Slow(kvstore.transfer.TransferObserver):
    """Gives every connection the time to join."""

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        time.sleep(0.002)
