"""The choice of congestion control and connections, over a table of measurements."""

from __future__ import annotations

import pytest

from kvstore.limits import CONNECTIONS_PER_TRANSFER_MAX, GIB, MIB
from kvstore.transfer.path import (
    LOSS_BOUND_CONNECTIONS,
    LOSS_BOUND_CONNECTIONS_MAX,
    PathMeasurement,
    choose_path,
)

BOTH = ("cubic", "bbr")
NEAR = PathMeasurement(round_trip_s=0.0002, congestion_controls=BOTH, left_bytes=GIB)
FAR = PathMeasurement(round_trip_s=0.04, congestion_controls=BOTH, left_bytes=GIB)
LOSSY = PathMeasurement(
    round_trip_s=0.04, congestion_controls=("cubic",), left_bytes=GIB, retransmitted_share=1e-3, connections=8,
    bytes_per_s=13e6,
)  # fmt: skip


def changed(measured: PathMeasurement, **fields: object) -> PathMeasurement:
    return PathMeasurement(**{**vars(measured), **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "congestion_control", "connections", "why"),
    [
        (NEAR, "cubic", 2, "near: cubic"),
        (changed(NEAR, congestion_controls=("bbr", "cubic")), "cubic", 2, "near: cubic"),
        (changed(NEAR, congestion_controls=("bbr",)), "bbr", 2, "cubic is not to be had"),
        (changed(NEAR, round_trip_s=0.00099), "cubic", 2, "near"),
        (changed(FAR, round_trip_s=0.001), "bbr", 1, "far"),
        (FAR, "bbr", 1, "round trip 40 ms, far: bbr"),
        (changed(FAR, congestion_controls=("bbr",)), "bbr", 1, "far: bbr"),
        (changed(FAR, retransmitted_share=0.1, connections=1, bytes_per_s=1e7), "bbr", 1, "bbr"),
        (changed(FAR, congestion_controls=("cubic",)), "cubic", LOSS_BOUND_CONNECTIONS, "bbr is not to be had"),
        (changed(FAR, congestion_controls=("reno", "cubic")), "reno", LOSS_BOUND_CONNECTIONS, "bbr is not to be had"),
        (changed(FAR, congestion_controls=()), None, LOSS_BOUND_CONNECTIONS, "not this process's to choose"),
        (PathMeasurement(), None, 2, "round-trip time unknown"),
        (PathMeasurement(congestion_controls=BOTH), "cubic", 2, "the system's choice"),
        # Growth, while losses hold back and more carry more.
        (LOSSY, "cubic", 16, "16 connections, since 0.10% is lost"),
        (changed(LOSSY, connections=16, fewer_bytes_per_s=7e6), "cubic", 32, "more carry more"),
        (changed(LOSSY, connections=16, fewer_bytes_per_s=12.5e6), "cubic", 16, "more did not carry more"),
        (changed(LOSSY, connections=32, fewer_bytes_per_s=7e6), "cubic", LOSS_BOUND_CONNECTIONS_MAX, "32"),
        (changed(LOSSY, bytes_per_s=None), "cubic", 8, "8 connections as before"),
        (changed(LOSSY, retransmitted_share=0.0), "cubic", 8, "which nothing holds back"),
        (changed(LOSSY, retransmitted_share=None), "cubic", 8, "which nothing holds back"),
        # A send buffer that is too small for bandwidth x delay holds every algorithm back.
        (changed(FAR, connections=1, bytes_per_s=1e7, buffer_max_bytes=4 * MIB), "bbr", 1, "nothing holds back"),
        (changed(FAR, connections=1, bytes_per_s=5e7, buffer_max_bytes=4 * MIB), "bbr", 2, "send buffer is full"),
        (changed(FAR, connections=2, bytes_per_s=5e7, buffer_max_bytes=4 * MIB), "bbr", 2, "nothing holds back"),
        (
            changed(FAR, connections=2, bytes_per_s=1e8, fewer_bytes_per_s=9e7, buffer_max_bytes=4 * MIB),
            "bbr",
            2,
            "more did not carry more",
        ),
        # What there is to send, and who else sends.
        (changed(LOSSY, left_bytes=3 * MIB), "cubic", 3, ""),
        (changed(LOSSY, left_bytes=1), "cubic", 1, ""),
        (changed(LOSSY, transfers=4), "cubic", 4, ""),
        (changed(LOSSY, transfers=100), "cubic", 1, ""),
        # Each way to the peer takes a connection.
        (changed(NEAR, routes=3), "cubic", 3, "near"),
        (changed(FAR, routes=2), "bbr", 2, "far"),
        (changed(LOSSY, transfers=100, routes=2), "cubic", 2, ""),
    ],
)
def test_the_choice(measured: PathMeasurement, congestion_control: str | None, connections: int, why: str) -> None:
    choice = choose_path(measured)
    assert (choice.congestion_control, choice.connections) == (congestion_control, connections)
    assert why in choice.why


@pytest.mark.parametrize("measured", [NEAR, FAR, LOSSY, PathMeasurement()])
def test_what_the_user_asks_for_always_holds(measured: PathMeasurement) -> None:
    choice = choose_path(measured, congestion_control="reno", connections=5)
    assert (choice.congestion_control, choice.connections) == ("reno", 5)
    assert "reno as asked" in choice.why
    assert "5 connections as asked" in choice.why
    assert choose_path(measured, connections=7).connections == 7
    # A loss-based algorithm that the user insists on gets the connections that it needs.
    if measured.is_far:
        assert choose_path(measured, congestion_control="cubic").connections > 1


def test_the_library_never_chooses_more_than_receivers_take() -> None:
    assert LOSS_BOUND_CONNECTIONS_MAX <= CONNECTIONS_PER_TRANSFER_MAX
