"""Two hosts of their own on this machine, joined by several wires of different rates, by IPv4 and IPv6.

Nothing outside of two network namespaces without names is touched. They end with the processes that hold them, which
end when their input does, whichever way a run ends.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.network.link import ANSWER_S, Host, Lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

TOOLS = ("unshare", "nsenter", "ip", "tc")
NUMBERS: dict[Host, int] = {"a": 1, "b": 2}


class NoWiresError(Exception):
    """This machine cannot make such hosts; the message says what is not there."""


class Wires:
    """The hosts `a` and `b`, and a pair of interfaces for each rate; a context manager.

    Args:
        rates_mbit: of the wires, both ways; headers count.

    Raises:
        NoWiresError: tools, rights or parts of the kernel are missing.
    """

    def __init__(self, rates_mbit: Sequence[int]) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise NoWiresError(f"there is no {', '.join(missing)} (of util-linux and iproute2) to join hosts with")
        with ExitStack() as opened:
            self._holders: dict[Host, Lines] = {}
            for host in NUMBERS:
                holder = self._holders[host] = Lines(["unshare", "--net", "cat"], stderr=subprocess.PIPE)
                opened.callback(holder.close)
                try:
                    holder.ask("ready")
                except RuntimeError as error:
                    assert holder.process.stderr is not None
                    raise NoWiresError(f"no network namespace: {holder.process.stderr.read().decode()}") from error
                self._run(host, "ip", "link", "set", "lo", "up")
            for wire, rate_mbit in enumerate(rates_mbit):
                self._add(wire, rate_mbit)
            self._opened = opened.pop_all()

    def _add(self, wire: int, rate_mbit: int) -> None:
        name = f"wire{wire}"
        peer = str(self._holders["b"].pid)
        self._run("a", "ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", peer)
        for host in NUMBERS:
            self._run(host, "ip", "address", "add", f"{self.ipv4(host, wire)}/24", "dev", name)
            if Path("/proc/net/if_inet6").exists():
                self._run(host, "ip", "address", "add", f"{self.ipv6(host, wire)}/64", "dev", name, "nodad")
            self._run(host, "ip", "link", "set", name, "up")
            shape = ("rate", f"{rate_mbit}mbit", "burst", "32kbit", "latency", "50ms")
            self._run(host, "tc", "qdisc", "add", "dev", name, "root", "tbf", *shape)

    def _run(self, host: Host, *words: str) -> str:
        done = subprocess.run(self.command(host, *words), capture_output=True, text=True, check=False, timeout=ANSWER_S)
        if done.returncode:
            raise NoWiresError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def command(self, host: Host, *words: str) -> list[str]:
        """A command line that runs a program on a host; the process is the program itself."""
        return ["nsenter", f"--net=/proc/{self._holders[host].pid}/ns/net", *words]

    @staticmethod
    def ipv4(host: Host, wire: int) -> str:
        return f"10.79.{wire}.{NUMBERS[host]}"

    @staticmethod
    def ipv6(host: Host, wire: int) -> str:
        return f"fd79:0:0:{wire}::{NUMBERS[host]}"

    def sent_bytes(self, host: Host, wire: int) -> int:
        """That have left over a wire, headers included."""
        return int(
            self._run(host, "ip", "-s", "-o", "link", "show", f"wire{wire}").split("TX:")[1].split("\\")[1].split()[0]
        )

    def __enter__(self) -> Wires:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the hosts. Idempotent."""
        self._opened.close()
