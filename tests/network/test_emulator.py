"""The emulator does what its settings say; otherwise the tests over its links would mean nothing."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.network.link import ADDRESSES, Direction, Host, Link, NoEmulatorError, Way, build_emulator
from tests.network.nodes import ROOT, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PORT = 9
DATAGRAM_BYTES = 1000
PACKET_BYTES = DATAGRAM_BYTES + 28
"""With the headers of UDP and IPv4."""


class Datagrams:
    """Numbered datagrams from one host to the other."""

    def __init__(self, link: Link, direction: Direction = "ab") -> None:
        hosts: tuple[Host, Host] = ("a", "b") if direction == "ab" else ("b", "a")
        self._link, self._direction = link, direction
        self._source, self._target = (link.socket(host, socket.SOCK_DGRAM) for host in hosts)
        self._address = (ADDRESSES[hosts[1]], PORT)
        self._target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._target.bind(self._address)

    def __enter__(self) -> Datagrams:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()
        self._target.close()

    def send(self, count: int, size_bytes: int = DATAGRAM_BYTES) -> None:
        """Send so many and wait until the emulator has dealt with each packet."""
        before = self._dealt_with
        for number in range(count):
            self._source.sendto(number.to_bytes(4, "big") + bytes(size_bytes - 4), self._address)
        packets = -(-(size_bytes + 28) // 1500) * count
        wait_until(lambda: self._dealt_with - before >= packets, "every packet was forwarded or lost")

    @property
    def _dealt_with(self) -> int:
        count = self._link.count(self._direction)
        return count.forwarded + count.lost + count.overflowed + count.cut

    def received(self) -> list[int]:
        """The numbers of those that have arrived."""
        numbers = []
        while select.select([self._target], [], [], 0.0)[0]:
            numbers.append(int.from_bytes(self._target.recv(1 << 16)[:4], "big"))
        return numbers


@pytest.fixture
def link(make_link: Callable[..., Link]) -> Iterator[Link]:
    return make_link(Way())


def test_packets_arrive_in_order(link: Link) -> None:
    for direction in ("ab", "ba"):
        with Datagrams(link, direction) as datagrams:
            datagrams.send(200)
            assert datagrams.received() == list(range(200))
            count = link.count(direction)
            assert (count.forwarded, count.forwarded_bytes) == (200, 200 * PACKET_BYTES)


def test_a_seed_names_the_packets_that_are_lost(make_link: Callable[..., Link]) -> None:
    arrived = []
    for seed in (5, 5, 6):
        link = make_link(Way(loss=0.2, seed=seed))
        with Datagrams(link) as datagrams:
            datagrams.send(500)
            arrived.append(datagrams.received())
            assert link.count("ab").lost == 500 - len(arrived[-1])
    assert arrived[0] == arrived[1] != arrived[2]
    assert 50 < 500 - len(arrived[0]) < 150


def test_packets_take_their_time(link: Link) -> None:
    link.change("ab", delay_s=0.03)
    with Datagrams(link) as datagrams:
        begin = time.monotonic()
        datagrams.send(1)
        assert time.monotonic() - begin >= 0.03
    link.change("ab", delay_s=0.0, rate_bits_per_s=1e6, queue_bytes=1 << 20)
    with Datagrams(link) as datagrams:
        begin = time.monotonic()
        datagrams.send(50)
        assert time.monotonic() - begin >= 50 * PACKET_BYTES * 8 / 1e6
        assert len(datagrams.received()) == 50


def test_a_full_queue_drops_what_comes(link: Link) -> None:
    link.change("ab", rate_bits_per_s=1e5, queue_bytes=10 * PACKET_BYTES)
    with Datagrams(link) as datagrams:
        datagrams.send(40)
        count = link.count("ab")
        # The queue, the packet that is leaving, and what has left meanwhile.
        assert 11 <= count.forwarded < 40
        assert count.overflowed == 40 - count.forwarded
        assert datagrams.received()[:11] == list(range(11))


def test_directions_are_apart(link: Link) -> None:
    link.down("ab")
    with Datagrams(link, "ab") as there, Datagrams(link, "ba") as back:
        there.send(10)
        back.send(10)
        assert (there.received(), back.received()) == ([], list(range(10)))
        assert (link.count("ab").cut, link.count("ba").cut) == (10, 0)
        link.up("ab")
        there.send(10)
        assert there.received() == list(range(10))


def test_a_link_goes_down_at_a_packet(link: Link) -> None:
    link.down_after("ab", 7)
    with Datagrams(link) as datagrams:
        datagrams.send(20)
        assert datagrams.received() == list(range(7))
        assert link.count("ab").cut == 13
        assert not link.count("ab").is_up


def test_what_is_under_way_is_lost_with_the_link(link: Link) -> None:
    link.change("ab", delay_s=30.0)
    with Datagrams(link) as datagrams:
        for number in range(5):
            datagrams._source.sendto(number.to_bytes(4, "big"), datagrams._address)
        # The emulator has them before it answers a later command, or takes them while the link is down.
        link.down("ab")
        wait_until(lambda: link.count("ab").cut == 5, "all were lost")
        link.change("ab", delay_s=0.0)
        link.up("ab")
        datagrams.send(1)
        assert datagrams.received() == [0]


def test_large_datagrams_are_cut_to_the_mtu(link: Link) -> None:
    with Datagrams(link) as datagrams:
        datagrams.send(1, size_bytes=4000)
        assert link.count("ab").forwarded == 3
        assert datagrams.received() == [0]


def test_mistakes_are_named(link: Link) -> None:
    with pytest.raises(ValueError, match="unknown way"):
        link.set("across", Way())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="malformed"):
        link._tell("set ab 1 2")


def test_hosts_see_nothing_but_their_link(link: Link) -> None:
    seen = subprocess.run(link.command("a", "cat", "/proc/net/dev"), capture_output=True, text=True, check=True)
    names = {line.split(":")[0].strip() for line in seen.stdout.splitlines()[2:]}
    assert {"lo", "link0"} <= names
    assert not any(name.startswith(("eth", "en", "wl")) for name in names)
    assert "link0" not in Path("/proc/net/dev").read_text()


OWNER = """
import sys, time
from pathlib import Path
from tests.network.link import Link, Way
with Link(Path(sys.argv[1]), Way()) as link:
    print(link._emulator.pid, flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_killed_run(emulator: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(emulator)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert Path(f"/proc/{pid}/comm").read_text().strip() == "emulator"
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
        owner.stdout.close()
    # Its namespaces have no names, and end with the last process inside.
    wait_until(lambda: not Path(f"/proc/{pid}/exe").exists(), "the emulator had ended")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = tmp_path / "emulator"
    forbidden.write_text("#!/bin/sh\necho 'cannot make a network namespace: Operation not permitted'\nexit 2\n")
    forbidden.chmod(0o755)
    with pytest.raises(NoEmulatorError, match="Operation not permitted"):
        Link(forbidden, Way())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoEmulatorError, match="no-such-compiler"):
        build_emulator(tmp_path)
