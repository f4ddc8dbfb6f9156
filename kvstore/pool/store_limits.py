"""What one store bears of each tenant, and for how long it bears it (docs/limits.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvstore.errors import ConfigError
from kvstore.limits import LIFE_S_MAX, PINNED_FRACTION_MAX, SALT_BYTES_MAX
from kvstore.units import parse_bytes

SALT_SHOWN_BYTES_MAX = 64


@dataclass(frozen=True)
class StoreLimits:
    """Limits of a store that its opener sets; `kvstore.limits` has those that nobody does.

    Attributes:
        quota: bytes that the records of one salt may take, headers, reservations and their share of the index
            included; `"2GiB"`, or None for no more than the tier has.
        quotas: other quotas of single salts; None lifts it.
        shelf_quota, shelf_quotas: the same for each further tier that evicts by itself (SSD, device slabs).
        ttl_s: time to live of what is written without one of its own; None for no end.
        pinned_fraction: the share of the tier, and of a salt's quota, that pins may keep from being evicted.
        lease_max_s: a lease that is held for longer ends; None for never.
        writer_max_s: a writer that is open for longer is aborted; None for never.

    Raises:
        ConfigError: one of them is no size, no fraction, or no positive number of seconds.
    """

    quota: int | str | None = None
    quotas: Mapping[bytes, int | str | None] = field(default_factory=dict)
    shelf_quota: int | str | None = None
    shelf_quotas: Mapping[bytes, int | str | None] = field(default_factory=dict)
    ttl_s: float | None = None
    pinned_fraction: float = PINNED_FRACTION_MAX
    lease_max_s: float | None = None
    writer_max_s: float | None = None

    def __post_init__(self) -> None:
        for one, many in (("quota", "quotas"), ("shelf_quota", "shelf_quotas")):
            by_salt = getattr(self, many)
            if not isinstance(by_salt, Mapping):
                raise ConfigError(
                    f"{many}={by_salt!r} is no mapping; pass sizes by salt, such as {{b'tenant-7': '2GiB'}}"
                )
            object.__setattr__(self, one, _size(one, getattr(self, one)))
            sizes = {_salt(salt): _size(f"the quota of {shown_salt(salt)}", size) for salt, size in by_salt.items()}
            object.__setattr__(self, many, MappingProxyType(sizes))
        if not isinstance(self.pinned_fraction, int | float) or not 0 <= self.pinned_fraction <= 1:
            raise ConfigError(f"pinned_fraction={self.pinned_fraction!r} is no share; give a number from 0 to 1")
        if self.ttl_s is not None and not (_is_seconds(self.ttl_s) and self.ttl_s <= LIFE_S_MAX):
            raise ConfigError(
                f"ttl_s={self.ttl_s!r} is no time to live; give seconds, at most {LIFE_S_MAX:.0f}, or None"
            )
        for name in ("lease_max_s", "writer_max_s"):
            seconds = getattr(self, name)
            if seconds is not None and not _is_seconds(seconds):
                raise ConfigError(
                    f"{name}={seconds!r} is no positive number of seconds; give one, such as 600, or None"
                )

    def of_shelves(self) -> StoreLimits:
        """What each further tier keeps to, as its own."""
        return StoreLimits(quota=self.shelf_quota, quotas=self.shelf_quotas)

    @property
    def has_quotas(self) -> bool:
        """Whether any salt has one."""
        return self.quota is not None or any(size is not None for size in self.quotas.values())

    def quota_of(self, salt: bytes) -> int | None:
        """Bytes that a salt may take; None for whatever the tier has."""
        size = self.quotas.get(salt, self.quota)
        assert not isinstance(size, str), "sizes are parsed when the limits are made"
        return size


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def shown_salt(salt: bytes) -> str:
    """A salt as messages name it."""
    if not salt:
        return "the empty salt"
    more = "" if len(salt) <= SALT_SHOWN_BYTES_MAX else f"... of {len(salt)} bytes"
    return f"salt {salt[:SALT_SHOWN_BYTES_MAX]!r}{more}"


def _salt(salt: bytes) -> bytes:
    if not isinstance(salt, bytes) or len(salt) > SALT_BYTES_MAX:
        raise ConfigError(f"{salt!r:.100} is no salt; quotas= takes bytes, at most {SALT_BYTES_MAX} of them")
    return salt


def _size(name: str, size: int | str | None) -> int | None:
    if size is None:
        return None
    try:
        parsed = parse_bytes(size)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is no size: {error}") from error
    if parsed <= 0:
        raise ConfigError(f"{name} is {parsed} bytes; give a positive size such as '2GiB', or None for no quota")
    return parsed
