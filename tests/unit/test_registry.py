"""Finding transports and codecs, those of other packages included."""

from __future__ import annotations

import sys
import types
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from kvstore import registry
from kvstore.abc import Availability, Codec, Connection, Listener, Transport, TransportOptions
from kvstore.errors import AddressError, CodecError, UnavailableError
from kvstore.testing.transport import connect_pair, soon
from transports.memory import MemoryTransport
from transports.tcp import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.clock import Deadline
    from kvstore.spec.dtypes import DType

    Install = Callable[..., None]


class PigeonTransport(Transport):
    """A third party's transport: memory under another scheme."""

    @property
    def scheme(self) -> str:
        return "pigeon"

    def availability(self) -> Availability:
        return Availability(True, "birds are at home")

    def listen(self, address: str, options: TransportOptions) -> Listener:
        return MemoryTransport().listen(address.replace("pigeon", "memory"), options)

    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        return MemoryTransport().connect(address.replace("pigeon", "memory"), options, deadline)


class AbsentTransport(PigeonTransport):
    def availability(self) -> Availability:
        return Availability(False, "no birds; install some")


class BrokenTransport(PigeonTransport):
    def __init__(self) -> None:
        raise ImportError("No module named 'feathers'")


class ReverseCodec(Codec):
    @property
    def name(self) -> str:
        return "reverse"

    def encoded_bytes_max(self, raw_bytes: int, dtype: DType) -> int:
        return raw_bytes

    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        return bytes(piece)[::-1]

    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        return bytes(encoded)[::-1]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make entry points appear as if a package with the module `third_party` were installed."""
    module = types.ModuleType("third_party")
    for thing in (PigeonTransport, AbsentTransport, BrokenTransport, ReverseCodec):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "third_party", module)

    def install(**targets_by_name: str) -> None:
        def entry_points(*, group: str) -> metadata.EntryPoints:
            return metadata.EntryPoints(
                metadata.EntryPoint(name, value.partition("|")[2], group)
                for name, value in targets_by_name.items()
                if value.partition("|")[0] == group
            )

        monkeypatch.setattr(metadata, "entry_points", entry_points)
        registry.forget()

    yield install
    monkeypatch.undo()
    registry.forget()


@pytest.fixture
def source_tree(install: Install) -> None:
    """No entry points at all, as when kvstore is imported from a source tree."""
    install()


@pytest.mark.usefixtures("source_tree")
def test_built_in_transports_need_no_entry_points() -> None:
    assert list(registry.available_transports()) == ["memory", "tcp"]
    assert isinstance(registry.transport_for("tcp://127.0.0.1:1"), TcpTransport)
    assert isinstance(registry.transport_for("MEMORY://x"), MemoryTransport)


@pytest.mark.usefixtures("source_tree")
def test_raw_codec_needs_no_entry_point() -> None:
    assert registry.codec_for("raw").name == "raw"


def test_own_entry_points_name_the_built_in_objects(install: Install) -> None:
    install(tcp="kvstore.transports|transports.tcp:TcpTransport", raw="kvstore.codecs|kvstore.codec.raw : RawCodec")
    assert isinstance(registry.transport_for("tcp://127.0.0.1:1"), TcpTransport)


def test_transport_of_another_package_is_found_and_works(install: Install) -> None:
    install(pigeon="kvstore.transports|third_party:PigeonTransport")
    assert set(registry.available_transports()) == {"memory", "pigeon", "tcp"}
    transport = registry.transport_for("pigeon://loft")
    assert isinstance(transport, PigeonTransport)
    listener = transport.listen("pigeon://loft", TransportOptions())
    near, far = connect_pair(_at(transport, "pigeon://loft"), listener)
    near.send([b"coo"], soon())
    received = bytearray(3)
    far.receive([memoryview(received)], soon())
    assert received == b"coo"
    for end in (near, far, listener):
        end.close()


@pytest.mark.usefixtures("source_tree")
@pytest.mark.parametrize("address", ["pigeon://loft", "http://127.0.0.1:1"])
def test_unknown_scheme_names_scheme_choices_and_remedy(address: str) -> None:
    scheme = address.partition(":")[0]
    with pytest.raises(AddressError, match=rf"{scheme}:// .*memory://, tcp://.*kvstore\.transports"):
        registry.transport_for(address)


@pytest.mark.usefixtures("source_tree")
@pytest.mark.parametrize("address", ["", "tcp", "tcp:", "tcp:/127.0.0.1:1", "://x", "127.0.0.1:1", "1tcp://x"])
def test_no_scheme_at_all(address: str) -> None:
    with pytest.raises(AddressError, match="memory://, tcp://"):
        registry.transport_for(address)


def test_transport_that_does_not_work_here(install: Install) -> None:
    install(pigeon="kvstore.transports|third_party:AbsentTransport")
    assert not registry.available_transports()["pigeon"].availability().is_available
    with pytest.raises(UnavailableError, match="no birds; install some"):
        registry.transport_for("pigeon://loft")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("third_party:BrokenTransport", "No module named 'feathers'"),
        ("third_party_gone:PigeonTransport", "third_party_gone"),
        ("third_party:Missing", "Missing"),
        ("third_party:ReverseCodec", "not a kvstore.abc.Transport"),
    ],
)
def test_transport_that_cannot_be_loaded_is_seen_and_harms_no_other(install: Install, target: str, reason: str) -> None:
    install(pigeon=f"kvstore.transports|{target}")
    found = registry.available_transports()
    assert found["tcp"].availability().is_available
    assert not found["pigeon"].availability().is_available
    assert reason in found["pigeon"].availability().detail
    with pytest.raises(UnavailableError, match=reason):
        registry.transport_for("pigeon://loft")
    with pytest.raises(UnavailableError, match=reason):
        found["pigeon"].listen("pigeon://loft", TransportOptions())
    with pytest.raises(UnavailableError, match=reason):
        found["pigeon"].connect("pigeon://loft", TransportOptions(), soon())


def test_entry_point_and_scheme_must_agree(install: Install) -> None:
    install(dove="kvstore.transports|third_party:PigeonTransport")
    with pytest.raises(UnavailableError, match=r"pigeon://.*'dove'"):
        registry.transport_for("dove://loft")


def test_a_package_cannot_take_a_scheme_over(install: Install) -> None:
    install(tcp="kvstore.transports|third_party:PigeonTransport")
    with pytest.raises(UnavailableError, match=r"third_party:PigeonTransport and transports\.tcp:TcpTransport"):
        registry.transport_for("tcp://127.0.0.1:1")


def test_codec_of_another_package(install: Install) -> None:
    install(reverse="kvstore.codecs|third_party:ReverseCodec [extra]")
    assert isinstance(registry.codec_for("reverse"), ReverseCodec)


def test_unknown_codec_names_choices_and_remedy(install: Install) -> None:
    install(reverse="kvstore.codecs|third_party:ReverseCodec")
    with pytest.raises(CodecError, match=r"'zstd'.*raw, reverse.*kvstore\.codecs"):
        registry.codec_for("zstd")


def test_codec_that_cannot_be_used(install: Install) -> None:
    install(reverse="kvstore.codecs|third_party:PigeonTransport", backward="kvstore.codecs|third_party:ReverseCodec")
    with pytest.raises(UnavailableError, match=r"not a kvstore\.abc\.Codec"):
        registry.codec_for("reverse")
    with pytest.raises(UnavailableError, match=r"'reverse'.*'backward'"):
        registry.codec_for("backward")


def _at(transport: Transport, address: str) -> Transport:
    """`transport`, connecting to `address` whatever its listener calls itself."""

    class At(PigeonTransport):
        def connect(self, _: str, options: TransportOptions, deadline: Deadline) -> Connection:
            return transport.connect(address, options, deadline)

    return At()
