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

NEAR_S = 0.001
"""Round trips shorter than this are within a machine or a rack, where losses are rare and loss-based control is at
its best: `cubic` carries twice what `bbr` does there, which models a path that it can hardly measure."""
NEAR_CONGESTION_CONTROL = "cubic"
_NAME_BYTES_MAX = 16
"""`TCP_CA_NAME_MAX` of `linux/tcp.h`."""
_TCPI_RTT_OFFSET = 68
"""`tcpi_rtt` in `struct tcp_info`, microseconds."""

UNSENT_S = 0.025
"""Seconds of paced bytes that may wait in the kernel before `send` blocks."""
BURST_S = 0.0005
"""Seconds of paced bytes that one segment may hold."""
SEGMENT_BYTES_MIN = 1400
SEGMENT_BYTES_MAX = 32767
"""The kernel's own limit on TCP_MAXSEG."""

_OFFERED = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_DEFAULT = Path("/proc/sys/net/ipv4/tcp_congestion_control")
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
        _set_congestion_control(sock, options.congestion_control)
    elif _adapts(options):
        # Until the round-trip time is known; see `adapt_congestion_control`.
        _set_congestion_control(sock, NEAR_CONGESTION_CONTROL)
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
def near_congestion_control() -> str | None:
    """The algorithm for short round trips, if this process may choose it; None leaves the system's choice."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NEAR_CONGESTION_CONTROL.encode())
        except OSError:
            return None
    return NEAR_CONGESTION_CONTROL


def _default_congestion_control() -> str:
    """What a new socket of this process has."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        name = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES_MAX)
    return name.rstrip(b"\0").decode()


def round_trip_s(sock: socket.socket) -> float | None:
    """The round-trip time of a connected socket as the kernel has measured it; None where it does not say."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_RTT_OFFSET + 4)
    except (AttributeError, OSError):
        return None
    if len(info) < _TCPI_RTT_OFFSET + 4:
        return None
    microseconds = int.from_bytes(info[_TCPI_RTT_OFFSET:], sys.byteorder)
    return microseconds / 1e6 if microseconds else None


def _adapts(options: TransportOptions) -> bool:
    """Whether the algorithm is this transport's to choose: the user has chosen none and wants no pace."""
    is_free = options.congestion_control is None and options.pacing_bytes_per_s is None
    return is_free and near_congestion_control() is not None


def adapt_congestion_control(sock: socket.socket, options: TransportOptions) -> None:
    """Go back to the system's choice if a connection that was just established turns out to be a long one.

    In this order because the other one does not work: a socket that was `bbr` stays paced whatever it is made later.
    """
    if not _adapts(options):
        return
    measured_s = round_trip_s(sock)
    if measured_s is None or measured_s >= NEAR_S:
        _set_congestion_control(sock, _default_congestion_control())


def _set_congestion_control(sock: socket.socket, name: str) -> None:
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
