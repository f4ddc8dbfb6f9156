"""Socket options that the baselines share. Of its own, so that they use nothing of our transports."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from kvstore.errors import BenchmarkError

NAME_BYTES_MAX = 16
"""`TCP_CA_NAME_MAX` of `linux/tcp.h`."""
NEAR_S = 0.001
NEAR_CONGESTION = "cubic"
"""What our TCP transport takes at round trips below `NEAR_S`, and so what baselines get there, too."""


def near_congestion() -> str:
    """The algorithm for short round trips if this process may choose it; empty leaves the system's."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NEAR_CONGESTION.encode())
        except OSError:
            return ""
    return NEAR_CONGESTION


def system_congestion() -> str:
    """What a socket has that nobody set anything on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES_MAX).rstrip(b"\0").decode()


def set_congestion(sock: socket.socket, name: str) -> None:
    """Raises `BenchmarkError` if this process may not choose it."""
    if not name:
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError as error:
        raise BenchmarkError(
            f"congestion control {name!r} is not to be had here ({error.strerror}); `kvstore doctor` lists what is"
        ) from error


def own_congestion() -> list[str]:
    """What the TCP sockets of this process have, whoever opened them; each algorithm once."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                is_internet = sock.family in (socket.AF_INET, socket.AF_INET6)
                if is_internet and sock.type == socket.SOCK_STREAM:
                    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES_MAX)
                    found.add(name.rstrip(b"\0").decode())
        except OSError:
            continue  # another thread has closed it, or it is of another protocol
    return sorted(found)


def free_port(host: str) -> int:
    """A TCP port that nobody listens on now; for programs that cannot say which one they took."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
