"""One TCP connection: vectored I/O straight between the socket and the caller's memory."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kvstore._native import socket_information
from kvstore.abc import Connection, ConnectionInformation
from kvstore.errors import DeadlineError, PeerGoneError, TransportError
from transports.buffers import byte_views
from transports.tcp.socket_options import (
    choosable_congestion_controls,
    send_buffer_max_bytes,
    set_congestion_control,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.clock import Deadline

VIEWS_PER_CALL_MAX = 1024
"""IOV_MAX of Linux."""
WAIT_S_MAX = 86400.0
"""One system call waits no longer; the loop around it goes on until the deadline."""

_LOCAL_FAULTS = {errno.ENOMEM, errno.ENOBUFS, errno.EFAULT, errno.EINVAL}
"""Errors of an established connection that are not the peer's doing."""


class TcpConnection(Connection):
    """A connected stream socket. The socket calls release the GIL and block in the kernel.

    The waits are the kernel's (`SO_SNDTIMEO`, `SO_RCVTIMEO`), one per direction, so that a sender and a
    receiver do not disturb each other, and a long vector needs one call rather than one per wake-up.

    Args:
        sock: connected; owned from here on.
        peer_address: for people.
        may_choose: congestion control is for the user of the connection to choose.
    """

    def __init__(self, sock: socket.socket, peer_address: str, *, may_choose: bool = False) -> None:
        sock.settimeout(None)
        self._may_choose = may_choose
        self._socket = sock
        self._peer_address = peer_address
        self._lock = threading.Lock()
        self._calls_running = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"TcpConnection({self._peer_address}, {'closed' if self._is_closed else 'open'})"

    @property
    def peer_address(self) -> str:
        return self._peer_address

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        with self._call(), byte_views(buffers) as views:
            try:
                self._send_all(views, deadline)
            except PeerGoneError:
                raise
            except BaseException:
                # A timeout or an interrupt leaves a message cut in two: nothing sensible can follow it.
                self.close()
                raise

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        with self._call(), byte_views(into, is_target=True) as views:
            wanted_bytes = sum(map(len, views))
            try:
                self._receive_all(views, wanted_bytes, deadline)
            except DeadlineError:
                if sum(map(len, views)) < wanted_bytes:
                    self.close()
                raise
            except PeerGoneError:
                raise
            except BaseException:
                # An interrupt may have taken bytes with it that were received and not yet counted.
                self.close()
                raise

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            # Wakes the calls that wait in the kernel. Refused if the peer has reset the connection; then none waits.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if self._calls_running == 0:
                self._socket.close()

    def native_stream(self) -> int | None:
        with self._lock:
            self._check_open()
            try:
                return os.dup(self._socket.fileno())
            except OSError as error:
                raise TransportError(
                    f"no descriptor is left for the connection to {self._peer_address} ({error.strerror}); raise "
                    "`ulimit -n`"
                ) from error

    def information(self) -> ConnectionInformation:
        with self._call():
            found = socket_information(self._socket.fileno())
        in_flight = found.in_flight_segments, found.segment_bytes
        return ConnectionInformation(
            round_trip_s=found.round_trip_s,
            round_trip_variation_s=found.round_trip_variation_s,
            round_trip_min_s=found.round_trip_min_s,
            delivery_bytes_per_s=found.delivery_bytes_per_s,
            is_app_limited=found.is_app_limited,
            sent_bytes=found.sent_bytes,
            retransmitted_bytes=found.retransmitted_bytes,
            acknowledged_bytes=found.acknowledged_bytes,
            in_flight_bytes=None if in_flight[0] is None or in_flight[1] is None else in_flight[0] * in_flight[1],
            unsent_bytes=found.unsent_bytes,
            buffer_max_bytes=send_buffer_max_bytes(),
            busy_s=found.busy_s,
            receiver_limited_s=found.receiver_limited_s,
            buffer_limited_s=found.buffer_limited_s,
            congestion_control=found.congestion_control,
        )

    def congestion_controls(self) -> tuple[str, ...]:
        return choosable_congestion_controls() if self._may_choose else ()

    def use_congestion_control(self, name: str) -> None:
        with self._call():
            set_congestion_control(self._socket, name)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """The descriptor stays open, and so its number is not used again, until the last call has left."""
        with self._lock:
            self._check_open()
            self._calls_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls_running -= 1
                if self._is_closed and self._calls_running == 0:
                    self._socket.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise PeerGoneError(f"the connection to {self._peer_address} was closed by this side; connect again")

    def _send_all(self, views: list[memoryview], deadline: Deadline) -> None:
        is_last_try = False
        while views:
            flags = socket.MSG_NOSIGNAL
            if is_last_try := self._prepare_wait(socket.SO_SNDTIMEO, deadline):
                flags |= socket.MSG_DONTWAIT
            try:
                sent = self._socket.sendmsg(views[:VIEWS_PER_CALL_MAX], (), flags)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise self._broken("sending", error) from error
            _advance(views, sent)
            if views:
                self._check_open()
                if is_last_try:
                    raise DeadlineError(
                        f"{sum(map(len, views))} bytes did not leave to {self._peer_address} in time; the connection "
                        "is closed, since part may have; the peer may be stopped, or slower than the deadline allows"
                    )

    def _receive_all(self, views: list[memoryview], wanted_bytes: int, deadline: Deadline) -> None:
        while views:
            flags = socket.MSG_WAITALL
            if is_last_try := self._prepare_wait(socket.SO_RCVTIMEO, deadline):
                flags = socket.MSG_DONTWAIT
            try:
                received, _, _, _ = self._socket.recvmsg_into(views[:VIEWS_PER_CALL_MAX], 0, flags)
            except BlockingIOError:
                received = -1
            except OSError as error:
                raise self._broken("receiving", error) from error
            _advance(views, max(received, 0))
            if not views:
                return
            self._check_open()
            missing_bytes = sum(map(len, views))
            if received == 0:
                raise PeerGoneError(
                    f"{self._peer_address} closed the connection after {wanted_bytes - missing_bytes} of "
                    f"{wanted_bytes} expected bytes"
                )
            if is_last_try:
                raise DeadlineError(
                    f"{missing_bytes} of {wanted_bytes} bytes did not come from {self._peer_address} in time"
                )

    def _prepare_wait(self, option: int, deadline: Deadline) -> bool:
        """Bound the next system call by the deadline; True if it has passed and only one more try is due."""
        remaining_s = min(deadline.remaining_s(), WAIT_S_MAX)
        if remaining_s == 0.0:
            return True
        # Rounded up, since a timeout of zero means for ever.
        seconds, microseconds = divmod(math.ceil(remaining_s * 1e6), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, microseconds))
        return False

    def _broken(self, doing: str, error: OSError) -> TransportError:
        self._check_open()
        if error.errno in _LOCAL_FAULTS:
            return TransportError(f"{doing} failed on the connection to {self._peer_address}: {error.strerror}")
        return PeerGoneError(
            f"the connection to {self._peer_address} broke while {doing}: {error.strerror}; the peer has ended, or "
            "the network between has"
        )


def _advance(views: list[memoryview], moved_bytes: int) -> None:
    """Take `moved_bytes` off the front of `views`, releasing what is done."""
    done = 0
    while done < len(views) and moved_bytes >= len(views[done]):
        moved_bytes -= len(views[done])
        views[done].release()
        done += 1
    del views[:done]
    if moved_bytes:
        whole = views[0]
        views[0] = whole[moved_bytes:]
        whole.release()
