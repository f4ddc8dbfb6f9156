"""What may be reached from other machines is said by the operator, in plain words."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from kvstore.errors import AddressError, ConfigError

LOCAL_SCHEMES = ("memory",)
"""Transports that do not leave the process."""
LOCAL_NAMES = ("localhost",)
"""Host names that are taken for loopback; where they led is looked at again once the socket is there."""
_HTTP_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
REMEDY = (
    "Listen on 127.0.0.1 or [::1]; or, if you trust everyone who can reach it, say so with --trust-network "
    "(trust_network = true in the file)"
)


def split_http_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host stands in brackets.

    Raises:
        AddressError: it is not of that form.
    """
    match = _HTTP_ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise AddressError(f"{address!r} is not host:port; write for example 127.0.0.1:7401 or [::1]:7401")
    return match["v6"] or match["host"], int(match["port"])


def check_exposure(addresses: tuple[str, ...], http_address: str, *, trust_network: bool) -> None:
    """Refuse to listen beyond loopback unless the operator trusts the network.

    Raises:
        ConfigError: an address that other machines may reach, or one of which this cannot be seen, or that is none.
    """
    for address in addresses:
        if "://" not in address:
            raise ConfigError(f"listen = {address!r} names no transport; write tcp://{address} for TCP")
    if http_address:
        try:
            split_http_address(http_address)
        except AddressError as error:
            raise ConfigError(f"http.listen = {error}") from error
    if trust_network:
        return
    for address in addresses:
        if not is_loopback(address):
            raise ConfigError(
                f"{address} is not a loopback address, and TCP is neither encrypted nor authenticated: whoever can "
                f"reach the port can read and write the cache. {REMEDY}"
            )
    if http_address and not is_loopback(f"http://{http_address}"):
        raise ConfigError(
            f"http.listen = {http_address} is not a loopback address, and there is no authentication: whoever can "
            f"reach the port can see models, peers and counters. {REMEDY}"
        )


def is_loopback(address: str) -> bool:
    """Whether only this host can reach an address. A host name other than localhost counts as reachable.

    One address may list several, `tcp://host:port,host:port`: all of them must be loopback.
    """
    scheme, separator, listed = address.partition("://")
    return scheme in LOCAL_SCHEMES or (bool(separator) and all(map(_is_loopback_place, listed.split(","))))


def _is_loopback_place(place: str) -> bool:
    """Of one `host:port`."""
    try:
        host = urlsplit(f"//{place}").hostname or ""
        return host in LOCAL_NAMES or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
