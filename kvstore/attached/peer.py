"""Who is at the other end of a Unix socket, and whether that process still lives."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from kvstore.errors import AttachError

_UCRED = struct.Struct("iII")
_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5


@dataclass(frozen=True)
class Peer:
    """A process as the kernel names it: when it connected, or began to listen."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """The process at the other end."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def watch_process(connection: socket.socket, peer: Peer) -> int:
    """A descriptor that becomes readable when the process at the other end has ended, all its threads included.

    Raises:
        AttachError: the process cannot be watched: it has ended, or lives in another PID namespace.
    """
    if peer.pid == 0:
        raise AttachError("the other process lives in a PID namespace that is not visible here; run both in one")
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # an older kernel is asked by number below; others know
            raise AttachError(f"process {peer.pid} cannot be watched: {error.strerror}") from error
    try:
        # By now somebody else may have the number; whoever had it then never held anything here.
        return os.pidfd_open(peer.pid)
    except OSError as error:
        raise AttachError(f"process {peer.pid} cannot be watched: {error.strerror}") from error


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
