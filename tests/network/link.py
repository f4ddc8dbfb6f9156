"""An emulated link between two hosts of its own on this machine: `emulator.cc`, built and driven from Python.

Nothing outside its two network namespaces is touched. They have no names and end with the emulator and the processes
inside, whichever way a run ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

SOURCE = Path(__file__).parent / "emulator.cc"
ADDRESSES = {"a": "10.78.0.1", "b": "10.78.0.2"}
ANSWER_S = 30.0
"""How long an answer of a child may take on a busy machine."""
QUEUE_BYTES_MIN = 64 << 10
_CLONE_NEWNET = 0x40000000
"""`linux/sched.h`; Python's `os` has `setns` from 3.12 on."""

Host = Literal["a", "b"]
Direction = Literal["ab", "ba"]
BOTH: tuple[Direction, Direction] = ("ab", "ba")


class NoEmulatorError(Exception):
    """This machine cannot emulate a link; the message says what is not there."""


@dataclass(frozen=True)
class Way:
    """One direction of a link.

    Attributes:
        delay_s: of every packet, beyond the time that the rate takes.
        loss: share of the packets that are lost, each by itself.
        rate_bits_per_s: of IP packets, headers included; 0 is unlimited.
        queue_bytes: that may wait for the rate; None is the product of the rate and both delays, if they are alike.
        seed: which packets are lost.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    rate_bits_per_s: float = 0.0
    queue_bytes: int | None = None
    seed: int = 1

    @property
    def words(self) -> str:
        """In the words of the emulator's `set`."""
        queue_bytes = self.queue_bytes
        if queue_bytes is None:
            queue_bytes = max(round(self.rate_bits_per_s / 8 * 2 * self.delay_s), QUEUE_BYTES_MIN)
        rate = round(self.rate_bits_per_s)
        return f"{round(self.delay_s * 1e6)} {round(self.loss * 1e6)} {rate} {queue_bytes} {self.seed}"


@dataclass(frozen=True)
class Count:
    """What has passed in one direction since the link was made.

    Attributes:
        forwarded, forwarded_bytes: packets that arrived, IP headers included.
        lost: at random.
        overflowed: the queue was full.
        cut: the link was down.
        is_up: whether it is up.
    """

    forwarded: int
    lost: int
    overflowed: int
    cut: int
    forwarded_bytes: int
    is_up: bool


class Lines:
    """A child that answers lines with lines; no answer takes longer than its deadline.

    Raises:
        RuntimeError: it has ended.
        TimeoutError: no answer in time.
    """

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        self._unread = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, line: str, within_s: float = ANSWER_S) -> str:
        """Send a line and return the one that answers it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"{self.process.args!r} has ended with {self.process.wait(ANSWER_S)}") from error
        return self.answer(within_s)

    def answer(self, within_s: float = ANSWER_S) -> str:
        """The next line, without its end."""
        assert self.process.stdout is not None
        until_s = time.monotonic() + within_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until_s - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{self.process.args!r} did not answer within {within_s:g} s")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise RuntimeError(f"{self.process.args!r} has ended with {self.process.wait(ANSWER_S)}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """End it, whatever state it is in. Idempotent."""
        self.process.kill()
        self.process.wait(ANSWER_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what it was not there to read any more


def build_emulator(folder: Path) -> Path:
    """Compile the emulator.

    Raises:
        NoEmulatorError: there is no compiler, or it does not know Linux's TUN devices.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise NoEmulatorError(
            f"there is no C++ compiler {compiler!r} to build the link emulator with; $CXX names another"
        )
    program = folder / "emulator"
    command = [compiler, "-std=c++20", "-O2", "-pthread", str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if built.returncode:
        raise NoEmulatorError(f"the link emulator does not compile here: {built.stderr[-500:]}")
    return program


class Link:
    """Two hosts, `a` and `b`, and what is between them; a context manager.

    Args:
        program: from `build_emulator`.
        way: both directions; their losses differ, since `ba` has the next seed.
        back: direction `ba`, where it is another.
        mtu: bytes of an IP packet.

    Raises:
        NoEmulatorError: this machine or user may not make namespaces or TUN devices.
    """

    def __init__(self, program: Path, way: Way, back: Way | None = None, *, mtu: int = 1500) -> None:
        if shutil.which("nsenter") is None:
            raise NoEmulatorError("there is no `nsenter` (of util-linux) to start programs on the hosts with")
        self._emulator = Lines([str(program), str(mtu)])
        self._ways: dict[Direction, Way] = {}
        try:
            first, *descriptors = self._emulator.answer().split()
            if first != "ready":
                raise NoEmulatorError(f"the link emulator says: {' '.join([first, *descriptors])}")
            self._namespaces = dict(zip("ab", descriptors, strict=True))
            self.set("ab", way)
            self.set("ba", back or replace(way, seed=way.seed + 1))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def command(self, host: Host, *words: str) -> list[str]:
        """A command line that runs a program on a host; the process is the program itself."""
        return ["nsenter", f"--net=/proc/{self._emulator.pid}/fd/{self._namespaces[host]}", *words]

    def socket(self, host: Host, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this process on a host, where it stays whoever uses it."""
        made: list[socket.socket] = []

        def make() -> None:
            # A thread of its own has a namespace of its own, and takes it along when it ends.
            with open(f"/proc/{self._emulator.pid}/fd/{self._namespaces[host]}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    return
                made.append(socket.socket(socket.AF_INET, kind))

        thread = threading.Thread(target=make, name="socket-on-host")
        thread.start()
        thread.join()
        if not made:
            raise NoEmulatorError("this process may not enter a network namespace that it has made")
        return made[0]

    def set(self, direction: Direction, way: Way) -> None:
        """Change a direction; packets under way keep their times. Begins its seed anew."""
        self._tell(f"set {direction} {way.words}")
        self._ways[direction] = way

    def change(self, *directions: Direction, **values: Any) -> None:
        """Change some values of the directions named, or of both."""
        for direction in directions or BOTH:
            self.set(direction, replace(self._ways[direction], **values))

    def down(self, *directions: Direction) -> None:
        """Lose every packet, those under way, too, without a word to either side."""
        for direction in directions or BOTH:
            self._tell(f"down {direction}")

    def down_after(self, direction: Direction, packets: int) -> None:
        """Lose every packet after so many more, which still arrive: a place in the stream, not a time."""
        self._tell(f"down_after {direction} {packets}")

    def up(self, *directions: Direction) -> None:
        """Carry packets again."""
        for direction in directions or BOTH:
            self._tell(f"up {direction}")

    def count(self, direction: Direction) -> Count:
        """What has passed."""
        forwarded, lost, overflowed, cut, size_bytes, is_up = map(int, self._emulator.ask(f"count {direction}").split())
        return Count(forwarded, lost, overflowed, cut, size_bytes, bool(is_up))

    def _tell(self, line: str) -> None:
        answer = self._emulator.ask(line)
        if answer != "ok":
            raise ValueError(f"the link emulator did not take {line!r}: {answer}")

    def close(self) -> None:
        """End the emulator; the hosts end with it and the programs that run on them."""
        self._emulator.close()
