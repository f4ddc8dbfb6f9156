"""The socket options of a connection, and what the user may choose of them."""

from __future__ import annotations

import errno
import math
import socket
import struct
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import TransportError, UnavailableError

if TYPE_CHECKING:
    from kvstore.abc import TransportOptions

SO_MAX_PACING_RATE = 47
"""`asm-generic/socket.h`; Python's `socket` has no name for it."""
TCP_NOTSENT_LOWAT = 25
"""`linux/tcp.h`; Python's `socket` has a name for it from 3.12 on."""
PACING_BYTES_PER_S_MIN = 1024.0

KEEPALIVE_IDLE_S = 15
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
"""A silent connection to a dead machine ends after 15 + 3 x 5 seconds."""

TCP_RTO_MAX_MS = 44
"""`linux/tcp.h`, from Linux 6.15 on."""
RETRANSMIT_PAUSE_MS_MAX = 1000
"""The least that the kernel takes. Otherwise TCP's pauses double: a path that was cut for 3 s at a round-trip time of
100 ms would be tried again after 6 s, when its transfers have long failed."""

FIRST_CONGESTION_CONTROL = "cubic"
"""What a connection begins with whose congestion control will be chosen when its round-trip time is known: the best one
for short round trips, where losses are rare. In this order because the other one does not work: a socket that was `bbr`
once stays paced whatever it is made later."""
_NAME_BYTES_MAX = 16
"""`TCP_CA_NAME_MAX` of `linux/tcp.h`."""
UNSENT_S = 0.025
"""Seconds of paced bytes that may wait in the kernel before `send` blocks."""
BURST_S = 0.0005
"""Seconds of paced bytes that one segment may hold."""
SEGMENT_BYTES_MIN = 1400
SEGMENT_BYTES_MAX = 32767
"""The kernel's own limit on TCP_MAXSEG."""

_OFFERED = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_DEFAULT = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_SEND_BUFFER = Path("/proc/sys/net/ipv4/tcp_wmem")
_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def prepare_socket(sock: socket.socket, options: TransportOptions) -> None:
    """Set what has to be there before `connect` or `listen`; accepted sockets inherit it.

    Raises:
        UnavailableError: this machine cannot do what the options ask for.
        TransportError: an option's value makes no sense.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    _bound_retransmit_pauses(sock)
    if options.congestion_control is not None:
        set_congestion_control(sock, options.congestion_control)
    elif may_choose_congestion_control(options) and FIRST_CONGESTION_CONTROL in choosable_congestion_controls():
        set_congestion_control(sock, FIRST_CONGESTION_CONTROL)
    if options.pacing_bytes_per_s is not None:
        _set_pacing(sock, options.pacing_bytes_per_s)


def _bound_retransmit_pauses(sock: socket.socket) -> None:
    """Have a path that was cut tried again soon after it is back, where the kernel can be told so."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, RETRANSMIT_PAUSE_MS_MAX)
    except OSError as error:
        # Elsewhere short cuts are survived less often, and nothing else is different.
        if error.errno not in (errno.ENOPROTOOPT, errno.EINVAL):
            raise


def congestion_controls() -> tuple[str, ...]:
    """The algorithms that the kernel offers, the default first; empty where it does not say."""
    offered = _OFFERED.read_text().split() if _OFFERED.exists() else []
    default = _DEFAULT.read_text().strip() if _DEFAULT.exists() else ""
    return tuple(sorted(offered, key=lambda name: name != default))


@cache
def choosable_congestion_controls() -> tuple[str, ...]:
    """Those that this process may set, the default first. Root may set all that the kernel offers."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        default = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES_MAX).rstrip(b"\0").decode()
        for name in dict.fromkeys((default, *congestion_controls())):
            try:
                probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            except OSError:
                continue  # Not allowed to this process: it is none of the choosable ones.
            found.append(name)
    return tuple(found)


@cache
def send_buffer_max_bytes() -> int | None:
    """How far the kernel lets a connection's send buffer grow; None where it does not say."""
    fields = _SEND_BUFFER.read_text().split() if _SEND_BUFFER.exists() else []
    return int(fields[2]) if len(fields) == 3 else None


def may_choose_congestion_control(options: TransportOptions) -> bool:
    """Whether the algorithm is this library's to choose: the user has chosen none and wants no pace."""
    return options.congestion_control is None and options.pacing_bytes_per_s is None


def set_congestion_control(sock: socket.socket, name: str) -> None:
    """Raises `UnavailableError`, which says what this process may set."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except (OSError, ValueError) as error:
        offered = ", ".join(congestion_controls()) or "unknown"
        if isinstance(error, PermissionError):
            allowed = _ALLOWED.read_text().strip() if _ALLOWED.exists() else "unknown"
            raise UnavailableError(
                f"congestion control {name!r} needs root here: the kernel offers {offered} and lets everyone use "
                f"{allowed}; choose one of these, or extend net.ipv4.tcp_allowed_congestion_control"
            ) from error
        raise UnavailableError(
            f"the kernel has no congestion control {name!r}: it offers {offered}; choose one of these, or load the "
            f"module tcp_{name}"
        ) from error


def _set_pacing(sock: socket.socket, pacing_bytes_per_s: float) -> None:
    if not (math.isfinite(pacing_bytes_per_s) and pacing_bytes_per_s >= PACING_BYTES_PER_S_MIN):
        raise TransportError(
            f"pacing_bytes_per_s is {pacing_bytes_per_s:g}; give at least {PACING_BYTES_PER_S_MIN:g}, or None to send "
            "as fast as the path allows"
        )
    rate = int(pacing_bytes_per_s)
    _set_pacing_rate(sock, rate)
    # Without a bound the kernel takes megabytes ahead, and a `send` that has returned says nothing about what
    # has left. The bound is on bytes not yet sent: SO_SNDBUF would count those in flight too, and so hold a
    # paced sender below its rate as soon as the round-trip time exceeds the buffer.
    unsent_bytes = min(max(int(rate * UNSENT_S), 2 * SEGMENT_BYTES_MIN), 2**31 - 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, unsent_bytes)
    # The kernel does not pace the first ten segments of a connection and paces in steps of two. On loopback a
    # segment is 64 KiB, so the first tenth of a second would run far above a low rate.
    segment_bytes = max(int(rate * BURST_S), SEGMENT_BYTES_MIN)
    if segment_bytes <= SEGMENT_BYTES_MAX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment_bytes)


def _set_pacing_rate(sock: socket.socket, rate: int) -> None:
    # Kernels before 4.20 read 32 bits whatever they are given, so what was set is read back.
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", rate))
        found = sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        raise UnavailableError(
            "this system has no SO_MAX_PACING_RATE (Linux has it from 3.13 on); leave pacing_bytes_per_s out"
        ) from error
    kept = int.from_bytes(found, sys.byteorder)
    if kept != rate:
        raise UnavailableError(
            f"asked to pace at {rate} bytes/s, this kernel keeps {kept}: before Linux 4.20 it has 32 bits for it; stay "
            f"below {2**32 - 1} or use a later kernel"
        )
