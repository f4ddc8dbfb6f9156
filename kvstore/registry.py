"""Finding transports and codecs: those that come with kvstore, and those of other packages.

A package adds one by an entry point of the group `kvstore.transports` (its name is the address scheme,
its object a class without arguments) or `kvstore.codecs` (its name is the codec's). What comes with
kvstore is found also where no entry points are, as in a source tree.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from kvstore.abc import Availability, Codec, Transport
from kvstore.errors import AddressError, CodecError, KVStoreError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.abc import Connection, Listener, TransportOptions
    from kvstore.clock import Deadline

TRANSPORT_GROUP = "kvstore.transports"
CODEC_GROUP = "kvstore.codecs"

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    TRANSPORT_GROUP: {"memory": "transports.memory:MemoryTransport", "tcp": "transports.tcp:TcpTransport"},
    CODEC_GROUP: {"raw": "kvstore.codec.raw:RawCodec"},
}
"""Group → name → `module:class` of what comes with kvstore."""

_found_available: set[Transport] = set()
"""Not asked again for every transfer: a transport that works may read much of the system to say so."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def available_transports() -> dict[str, Transport]:
    """Every transport that is installed, by scheme; `availability()` tells whether it works here.

    One that cannot be loaded is there too, and says why. Any thread may call.
    """
    return {scheme: _transport(scheme) for scheme in _known(TRANSPORT_GROUP)}


def transport_for(address: str) -> Transport:
    """The transport of an address such as `tcp://10.0.0.2:7400`. Any thread may call.

    Raises:
        AddressError: it is no str, there is no scheme, or no transport for it.
        UnavailableError: the transport cannot be loaded, or does not work on this machine.
    """
    schemes = ", ".join(f"{scheme}://" for scheme in _known(TRANSPORT_GROUP))
    match = _SCHEME.match(address) if isinstance(address, str) else None
    if match is None:
        raise AddressError(f"{address!r} names no transport; begin it with one of {schemes}")
    scheme = match[1].lower()
    if scheme not in _known(TRANSPORT_GROUP):
        raise AddressError(
            f"no transport is installed for {scheme}:// in {address!r}; known are {schemes}. Use one of these, or "
            f"install a package with an entry point {scheme!r} in the group {TRANSPORT_GROUP}"
        )
    transport = _transport(scheme)
    if transport not in _found_available:
        availability = transport.availability()
        if not availability.is_available:
            raise UnavailableError(f"the transport {scheme}:// cannot be used here: {availability.detail}")
        _found_available.add(transport)
    return transport


def codec_for(name: str) -> Codec:
    """The codec of a name in a record's codec chain. Any thread may call.

    Raises:
        CodecError: no codec of that name is installed.
        UnavailableError: it cannot be loaded.
    """
    known = _known(CODEC_GROUP)
    if name not in known:
        raise CodecError(
            f"no codec {name!r} is installed; known are {', '.join(known)}. Install a package with an entry point "
            f"{name!r} in the group {CODEC_GROUP}"
        )
    codec = _load(CODEC_GROUP, name)
    if not isinstance(codec, Codec):
        raise UnavailableError(f"{known[name]} is not a kvstore.abc.Codec; ask its package for a version that is")
    if codec.name != name:
        raise UnavailableError(f"{known[name]} calls itself {codec.name!r}, its entry point {name!r}; they must agree")
    return codec


def forget() -> None:
    """Look for packages again, after one was installed or removed while this process runs."""
    _known.cache_clear()
    _transport.cache_clear()
    _found_available.clear()


@cache
def _known(group: str) -> Mapping[str, str]:
    """Name → `module:class`, the names sorted. Two packages with one name are both kept, for the message."""
    found: dict[str, set[str]] = {name: {target} for name, target in BUILT_IN[group].items()}
    for entry_point in metadata.entry_points(group=group):
        found.setdefault(entry_point.name, set()).add(entry_point.value.partition("[")[0].replace(" ", ""))
    return {name: " and ".join(sorted(targets)) for name, targets in sorted(found.items())}


def _load(group: str, name: str) -> object:
    target = _known(group)[name]
    if " and " in target:
        raise UnavailableError(f"{name!r} of {group} is claimed by {target}; uninstall all but one of them")
    module_name, _, attribute_path = target.partition(":")
    try:
        found: Any = import_module(module_name)
        for attribute in attribute_path.split("."):
            found = getattr(found, attribute)
        return found()
    except KVStoreError:
        raise
    except Exception as error:
        raise UnavailableError(
            f"{name!r} of {group} ({target}) cannot be loaded: {type(error).__name__}: {error}; reinstall its package, "
            "or install what the message names"
        ) from error


@cache
def _transport(scheme: str) -> Transport:
    try:
        transport = _load(TRANSPORT_GROUP, scheme)
    except KVStoreError as error:
        return _UnloadableTransport(scheme, str(error))
    target = _known(TRANSPORT_GROUP)[scheme]
    if not isinstance(transport, Transport):
        return _UnloadableTransport(scheme, f"{target} is not a kvstore.abc.Transport")
    if transport.scheme != scheme:
        return _UnloadableTransport(
            scheme, f"{target} is for {transport.scheme}://, but its entry point is {scheme!r}; they must agree"
        )
    return transport


class _UnloadableTransport(Transport):
    """Stands for a transport that is installed but cannot be loaded, so that it is seen and says why."""

    def __init__(self, scheme: str, reason: str) -> None:
        self._scheme = scheme
        self._reason = reason

    @property
    def scheme(self) -> str:
        return self._scheme

    def availability(self) -> Availability:
        return Availability(False, self._reason)

    def listen(self, address: str, options: TransportOptions) -> Listener:
        raise UnavailableError(f"cannot listen on {address}: {self._reason}")

    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        raise UnavailableError(f"cannot connect to {address}: {self._reason}")
