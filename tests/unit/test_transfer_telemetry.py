"""Links: smoothing, windows, and what a sender without much to send must not do to them."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace

import pytest

from kvstore.abc import Connection, ConnectionInformation, TransportOptions
from kvstore.errors import PeerGoneError
from kvstore.limits import GIB, MIB
from kvstore.transfer import LinkSnapshot, TransferSettings
from kvstore.transfer import path_watch as path_watch_module
from kvstore.transfer.path_watch import FRAME_BYTES_FIRST, UNSENT_BYTES_MIN, PathWatch
from kvstore.transfer.telemetry import Link, LinkSample, LinkTable, Smoothed

PEER = "tcp://10.0.0.2:7400"
TRANSFER = object()
START_S = time.monotonic()


def running(link: Link) -> Link:
    link.begin(TRANSFER, START_S)
    return link


def feed(link: Link, rate: float, seconds: float, *, begin_s: float = 0.0, is_app_limited: bool = False) -> float:
    """Ten samples a second; when the last one was."""
    at_s = begin_s
    for step in range(1, round(seconds * 10) + 1):
        at_s = begin_s + step / 10
        link.note(
            TRANSFER,
            LinkSample(START_S + at_s + 1e-6, acknowledged_bytes=round(rate / 10), is_app_limited=is_app_limited),
        )
    return at_s


def rate_of(link: Link) -> float:
    rate = link.delivery_bytes_per_s
    assert rate is not None
    return rate


def test_a_smoothed_value_follows_with_its_time_constant() -> None:
    value = Smoothed(2.0)
    value.note(10.0, 100.0)
    assert value.value == 10.0
    value.note(20.0, 102.0)
    assert value.value == pytest.approx(20.0 - 10.0 / 2.718281828, rel=1e-6)
    value.note(50.0, 1000.0)
    assert value.value == pytest.approx(50.0), "what is long ago does not count"


def test_the_rate_is_that_of_the_bytes_that_were_acknowledged() -> None:
    link = running(Link(PEER, START_S))
    feed(link, 1e8, 3.0)
    assert rate_of(link) == pytest.approx(1e8, rel=0.01)


def test_a_sender_with_little_to_send_does_not_lower_the_rate() -> None:
    link = running(Link(PEER, START_S))
    end_s = feed(link, 1e8, 3.0)
    before = rate_of(link)
    end_s = feed(link, 1e6, 10.0, begin_s=end_s, is_app_limited=True)
    assert rate_of(link) == before
    end_s = feed(link, 2e8, 3.0, begin_s=end_s, is_app_limited=True)
    assert rate_of(link) > 1.8e8, "it may raise it"
    feed(link, 1e7, 5.0, begin_s=end_s)
    assert rate_of(link) < 2e7, "and a link that got slower is noticed"


def test_transfers_to_one_peer_add_up() -> None:
    link = running(Link(PEER, START_S))
    other = object()
    link.begin(other, START_S)
    for step in range(1, 60):
        for transfer, offset in ((TRANSFER, 0.0), (other, 0.05)):
            sample = LinkSample(START_S + step / 10 + offset, 3, acknowledged_bytes=10**6, queued_bytes=5,
                                in_flight_bytes=7, is_app_limited=False)  # fmt: skip
            link.note(transfer, sample)
    assert rate_of(link) == pytest.approx(2e7, rel=0.1)
    snapshot = link.snapshot(time.monotonic())
    assert (snapshot.transfers_running, snapshot.connections) == (2, 6)
    assert (snapshot.queued_bytes, snapshot.in_flight_bytes) == (10, 14)
    link.end(other, 0.1, bytes_per_s=None, unseen_bytes=None)
    assert link.snapshot(time.monotonic()).queued_bytes == 5


def test_the_share_of_losses_forgets() -> None:
    link = running(Link(PEER, START_S))
    sample = LinkSample(START_S, sent_bytes=10**6, retransmitted_bytes=10**4)
    link.note(TRANSFER, sample)
    assert link.retransmitted_share == pytest.approx(0.01)
    link.note(TRANSFER, replace(sample, at_s=START_S + 100.0, retransmitted_bytes=0))
    assert link.retransmitted_share == pytest.approx(0.0, abs=1e-6)


def test_the_smallest_round_trip_stands_for_five_minutes() -> None:
    link = running(Link(PEER, START_S))
    for at_s, round_trip_s, expected_s in ((0, 0.05, 0.05), (1, 0.04, 0.04), (200, 0.06, 0.04), (302, 0.07, 0.07)):
        link.note(TRANSFER, LinkSample(START_S + at_s, round_trip_min_s=round_trip_s, round_trip_s=round_trip_s))
        assert link.round_trip_min_s == expected_s


def test_idle_links_keep_their_values_and_age() -> None:
    link = running(Link(PEER, START_S))
    feed(link, 1e8, 1.0)
    link.end(TRANSFER, 0.25, bytes_per_s=5.0, unseen_bytes=None)
    first = link.snapshot(START_S + 11.0)
    later = link.snapshot(START_S + 111.0)
    assert later.age_s == pytest.approx(first.age_s + 100.0)
    assert later == replace(first, age_s=later.age_s)
    assert later.delivery_bytes_per_s == pytest.approx(1e8, rel=0.01), "the transfer's own guess was not needed"
    assert (later.transfers, later.transfers_running, later.exposed_s) == (1, 0, 0.25)


def test_exposed_time_is_smoothed_over_transfers() -> None:
    link = Link(PEER, START_S)
    for exposed_s in (1.0, 0.0, None, 0.0):
        link.begin(TRANSFER, START_S)
        link.end(TRANSFER, exposed_s, bytes_per_s=None, unseen_bytes=None)
    snapshot = link.snapshot(START_S)
    assert snapshot.exposed_s == pytest.approx(0.75**2)
    assert (snapshot.exposed_total_s, snapshot.transfers) == (1.0, 3)


def test_a_link_that_cannot_tell_gets_the_rates_of_whole_transfers() -> None:
    link = Link(PEER, START_S)
    for rate in (1e6, 4e6):
        link.begin(TRANSFER, START_S)
        link.end(TRANSFER, 0.0, bytes_per_s=rate, unseen_bytes=1000)
    assert 1e6 <= rate_of(link) <= 4e6
    assert link.snapshot(START_S).sent_bytes == 2000


def test_the_table_forgets_the_link_that_was_used_the_longest_ago() -> None:
    table = LinkTable(links_max=3)
    links = {name: table.link(name) for name in "abc"}
    assert table.link("a") is links["a"]
    table.link("d")
    assert [snapshot.peer_address for snapshot in table.snapshot()] == ["c", "a", "d"]
    assert all(isinstance(snapshot, LinkSnapshot) for snapshot in table.snapshot())
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.snapshot()[0].transfers = 5  # type: ignore[misc]


# A transfer's eye on its connections


class TellingConnection(Connection):
    """Says of its path what the test wants."""

    def __init__(self, controls: tuple[str, ...] = ("bbr", "cubic"), **told: float) -> None:
        self.controls = controls
        self.told = ConnectionInformation(
            round_trip_s=0.04, acknowledged_bytes=0, sent_bytes=0, unsent_bytes=1, congestion_control="cubic"
        )
        self.tell(**told)
        self.is_closed = False

    def tell(self, **told: float) -> None:
        self.told = replace(self.told, **told)  # type: ignore[arg-type]

    @property
    def peer_address(self) -> str:
        return PEER

    def information(self) -> ConnectionInformation:
        if self.is_closed:
            raise PeerGoneError("closed")
        return self.told

    def congestion_controls(self) -> tuple[str, ...]:
        return self.controls

    def use_congestion_control(self, name: str) -> None:
        self.told = replace(self.told, congestion_control=name)

    def send(self, *_: object) -> None:
        raise NotImplementedError

    def receive(self, *_: object) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.is_closed = True


def watch(link: Link | None = None, connections: int | None = None) -> PathWatch:
    return PathWatch(link or Link(PEER, START_S), TransportOptions(), TransferSettings(connections=connections))


def test_a_connection_gets_the_algorithm_for_its_path() -> None:
    for round_trip_s, expected in ((0.04, "bbr"), (0.0001, "cubic")):
        connection = TellingConnection(round_trip_s=round_trip_s)
        path = watch()
        path.opened(connection)
        assert connection.told.congestion_control == expected
        assert path.report().congestion_control == (expected,)


def test_a_small_transfer_on_a_near_path_uses_one_connection() -> None:
    for wanted_bytes, expected in ((MIB, 1), (GIB, 2)):
        path = watch()
        path.opened(TellingConnection(round_trip_s=0.0001))
        assert path.begin(wanted_bytes, GIB) == expected


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The moment that a watch sees."""
    now_s = [START_S]
    monkeypatch.setattr(path_watch_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now_s[0])}))
    return now_s


def send_for(
    path: PathWatch, clock: list[float], connections: list[TellingConnection], rate: float, *, unsent_bytes: int = 1
) -> int:
    """Two seconds of a transfer that loses one in a thousand bytes."""
    count = 0
    for _ in range(20):
        clock[0] += 0.1
        for connection in connections:
            moved = round(rate / 10 / len(connections))
            connection.tell(
                acknowledged_bytes=(connection.told.acknowledged_bytes or 0) + moved,
                sent_bytes=(connection.told.sent_bytes or 0) + moved,
                retransmitted_bytes=(connection.told.retransmitted_bytes or 0) + moved // 1000,
                unsent_bytes=unsent_bytes,
            )
        count = path.sample()
    return count


def lossy(clock: list[float]) -> tuple[Link, PathWatch, list[TellingConnection]]:
    link = Link(PEER, START_S)
    path = watch(link)
    connections = [TellingConnection(controls=("cubic",))]
    path.opened(connections[0])
    assert path.begin(100 * GIB, GIB) == 8
    for _ in range(7):
        connections.append(TellingConnection(controls=("cubic",)))
        path.opened(connections[-1])
    return link, path, connections


def test_connections_grow_while_that_pays_and_the_link_remembers(clock: list[float]) -> None:
    link, path, connections = lossy(clock)
    assert send_for(path, clock, connections, 1e7) == 16
    for _ in range(8):
        connections.append(TellingConnection(controls=("cubic",)))
        path.opened(connections[-1])
    assert send_for(path, clock, connections, 1.01e7) == 16, "twice as many did not carry more"
    report = path.report()
    assert report.connections == 16
    assert "bbr is not to be had" in report.why
    assert report.retransmitted_share == pytest.approx(1e-3, rel=0.01)
    following = watch(link)
    following.opened(TellingConnection(controls=("cubic",)))
    assert following.begin(100 * GIB, GIB) == 8, "the link is shared with the first one, which still runs"
    path.end(None)
    assert following.begin(100 * GIB, GIB) == 16


def test_a_transfer_without_enough_to_send_does_not_grow(clock: list[float]) -> None:
    _, path, connections = lossy(clock)
    assert send_for(path, clock, connections, 1e7, unsent_bytes=0) == 8


def test_an_explicit_number_never_grows(clock: list[float]) -> None:
    path = watch(connections=3)
    connections = [TellingConnection(controls=("cubic",))]
    path.opened(connections[0])
    assert path.begin(100 * GIB, GIB) == 3
    assert send_for(path, clock, connections, 1e7) == 3


def test_frames_on_a_far_path_fit_what_a_connection_carries(clock: list[float]) -> None:
    path = watch()
    far, near = TellingConnection(), TellingConnection(round_trip_s=0.0001)
    path.opened(far)
    path.opened(near)
    path.begin(GIB, GIB)
    assert path.frame_bytes(far, 4 * MIB) == FRAME_BYTES_FIRST
    assert path.frame_bytes(near, 4 * MIB) == 4 * MIB
    far.tell(delivery_bytes_per_s=2e7)
    near.tell(delivery_bytes_per_s=2e7)
    path.sample(is_last=True)
    assert path.frame_bytes(far, 4 * MIB) == 1_000_000
    assert path.frame_bytes(far, 1000) == 1000
    assert path.frame_bytes(near, 4 * MIB) == 4 * MIB


def test_several_connections_leave_little_in_the_kernel(clock: list[float]) -> None:
    path = watch()
    first, second = TellingConnection(), TellingConnection()
    path.opened(first)
    path.begin(GIB, GIB)
    assert path.unsent_bytes(first) == 0
    path.opened(second)
    assert path.unsent_bytes(first) == FRAME_BYTES_FIRST
    first.tell(delivery_bytes_per_s=2e7)
    second.tell(delivery_bytes_per_s=1e5)
    path.sample(is_last=True)
    assert path.unsent_bytes(first) == 1_000_000
    assert path.unsent_bytes(second) == UNSENT_BYTES_MIN
    path.closed(second)
    assert path.unsent_bytes(first) == 0
    assert path.unsent_bytes(second) == 0


@pytest.mark.parametrize(("routes", "unsent_bytes"), [(1, 0), (2, 1_000_000)])
def test_near_connections_are_bounded_on_several_ways_only(clock: list[float], routes: int, unsent_bytes: int) -> None:
    path = PathWatch(Link(PEER, START_S), TransportOptions(), TransferSettings(), routes)
    near = [TellingConnection(round_trip_s=0.0001) for _ in range(2)]
    for connection in near:
        path.opened(connection)
        connection.tell(delivery_bytes_per_s=2e7, is_app_limited=False)
    path.begin(GIB, GIB)
    path.sample(is_last=True)
    assert [path.unsent_bytes(connection) for connection in near] == [unsent_bytes] * 2


def test_a_closed_connection_is_forgotten(clock: list[float]) -> None:
    path = watch()
    first, second = TellingConnection(), TellingConnection()
    path.opened(first)
    path.opened(second)
    path.begin(GIB, GIB)
    second.close()
    path.sample(is_last=True)
    assert path.report().connections == 2
    path.closed(first)
    path.closed(first)
    path.sample(is_last=True)


def test_what_else_held_a_far_transfer_back_is_reported(clock: list[float]) -> None:
    link = Link(PEER, START_S)
    path = watch(link)
    connection = TellingConnection(busy_s=0.0, receiver_limited_s=0.0, buffer_limited_s=0.0)
    path.opened(connection)
    path.begin(100 * GIB, MIB)
    assert path.report().limits == ()
    connection.tell(busy_s=1.0, receiver_limited_s=0.5, buffer_limited_s=0.4)
    send_for(path, clock, [connection], 1e9)
    limits = path.report().limits
    assert [word in text for word, text in zip(("tcp_rmem", "tcp_wmem", "credit_bytes"), limits, strict=True)] == [
        True
    ] * 3
