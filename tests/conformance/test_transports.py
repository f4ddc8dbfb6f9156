"""The transports that come with kvstore pass the kit that third parties use."""

from __future__ import annotations

import itertools
import socket
from typing import TYPE_CHECKING, ClassVar

import pytest

from kvstore.testing.transport import TransportConformance
from transports.memory import MemoryTransport
from transports.tcp import TcpTransport

if TYPE_CHECKING:
    from kvstore.abc import Transport

_names = itertools.count()


class TestTcp(TransportConformance):
    malformed_addresses: ClassVar[tuple[str, ...]] = (
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:x",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://256.0.0.1:1",
        "tcp://1.2.3:1",
        "tcp://::1:1",
        "tcp://[::1:1",
        "tcp://[::g]:1",
        "tcp://[127.0.0.1]:1",
        "tcp://host name:1",
        "tcp://user@host:1",
        "tcp://127.0.0.1:1/path",
        "tcp://127.0.0.1:1\n",
        f"tcp://{'a' * 254}:1",
        "TCP//127.0.0.1:1",
    )

    @pytest.fixture
    def transport(self) -> Transport:
        return TcpTransport()

    def listen_address(self) -> str:
        return "tcp://127.0.0.1:0"


class TestTcpIPv6(TestTcp):
    @pytest.fixture
    def transport(self) -> Transport:
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 loopback on this machine: {error}")
        return TcpTransport()

    def listen_address(self) -> str:
        return "tcp://[::1]:0"


class TestMemory(TransportConformance):
    malformed_addresses: ClassVar[tuple[str, ...]] = (
        "memory://",
        "memory:///",
        "memory://a b",
        "memory://a/b",
        "memory://a\n",
        f"memory://{'a' * 129}",
    )
    buffered_bytes_max: ClassVar[int] = 4 << 20

    @pytest.fixture
    def transport(self) -> Transport:
        return MemoryTransport()

    def listen_address(self) -> str:
        return f"memory://conformance-{next(_names)}"
