"""Where an SSD tier keeps its records, and how much of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvstore.errors import ConfigError
from kvstore.limits import (
    SSD_BATCH_BYTES_DEFAULT,
    SSD_CAPACITY_BYTES_MIN,
    SSD_DIRECTORIES_MAX,
    SSD_QUEUE_BYTES_DEFAULT,
    SSD_WRITE_DEADLINE_S,
)
from kvstore.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class SsdPlace:
    """One directory and what it may take.

    Raises:
        ConfigError: the capacity is no size, or less than `SSD_CAPACITY_BYTES_MIN`; or there is no path.
    """

    path: str
    capacity_bytes: int

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("an SSD directory has no path; write for example '/var/cache/kv:200GiB'")
        if self.capacity_bytes < SSD_CAPACITY_BYTES_MIN:
            raise ConfigError(
                f"the SSD directory {self.path} is to hold {format_bytes(self.capacity_bytes)}, the least is "
                f"{format_bytes(SSD_CAPACITY_BYTES_MIN)}; give it more, or leave it out"
            )

    @classmethod
    def parse(cls, text: str) -> SsdPlace:
        """Path and capacity, separated by the last colon: `/var/cache/kv:200GiB`.

        Raises:
            ConfigError: there is no capacity, or it is no size.
        """
        path, colon, size = text.rpartition(":")
        if not colon:
            raise ConfigError(
                f"the SSD directory {text!r} has no capacity; write for example '{text or '/dir'}:200GiB'"
            )
        try:
            capacity_bytes = parse_bytes(size)
        except ValueError as error:
            raise ConfigError(f"the capacity of the SSD directory {path!r}: {error}") from error
        return cls(path, capacity_bytes)


@dataclass(frozen=True)
class SsdOptions:
    """How an SSD tier is opened.

    Attributes:
        directories: one, or one on each drive: `/dir:200GiB`, or `SsdPlace`.
        write_bytes_per_day: the most that is written in any 24 hours, whatever for, `"2TiB"`; None for no limit.
        engine: what moves bytes (`io_uring`, `threads`); None takes the best that works.
        queue_bytes: records that may wait to be written, which keep their memory meanwhile; one resume point may
            exceed it alone.
        batch_bytes: records that are made durable together.
        write_deadline_s: for one such batch; a disk that is slower than that is given up for the time being.

    Raises:
        ConfigError: no directory, too many, one twice, or a limit that is no size or not positive.
    """

    directories: str | SsdPlace | Sequence[str | SsdPlace]
    write_bytes_per_day: int | str | None = None
    engine: str | None = None
    queue_bytes: int = SSD_QUEUE_BYTES_DEFAULT
    batch_bytes: int = SSD_BATCH_BYTES_DEFAULT
    write_deadline_s: float = SSD_WRITE_DEADLINE_S

    def __post_init__(self) -> None:
        given = self.directories
        listed = [given] if isinstance(given, (str, SsdPlace)) else given
        if not isinstance(listed, (list, tuple)) or not all(isinstance(each, (str, SsdPlace)) for each in listed):
            raise ConfigError(
                f"ssd={given!r} names no directories; write for example '/var/cache/kv:200GiB', or a list of such"
            )
        places = tuple(SsdPlace.parse(each) if isinstance(each, str) else each for each in listed)
        object.__setattr__(self, "directories", places)
        if not 1 <= len(places) <= SSD_DIRECTORIES_MAX:
            raise ConfigError(f"an SSD tier has 1 to {SSD_DIRECTORIES_MAX} directories, not {len(places)}")
        if len({os.path.realpath(place.path) for place in places}) != len(places):
            paths = ", ".join(place.path for place in places)
            raise ConfigError(f"an SSD tier names each directory once, not {paths}; leave one out")
        for name in ("write_bytes_per_day", "queue_bytes", "batch_bytes"):
            value = getattr(self, name)
            if value is None and name == "write_bytes_per_day":
                continue
            try:
                object.__setattr__(self, name, parse_bytes(value))
            except ValueError as error:
                raise ConfigError(f"{name} of an SSD tier: {error}") from error
        if not self.write_deadline_s > 0:
            raise ConfigError(f"write_deadline_s of an SSD tier must be positive, not {self.write_deadline_s}")

    @classmethod
    def of(cls, what: AnySsd) -> SsdOptions:
        """Options from whatever stands for them: text, a list of texts, or options.

        Raises:
            ConfigError: as the constructor's.
        """
        return what if isinstance(what, SsdOptions) else cls(what)

    @property
    def places(self) -> tuple[SsdPlace, ...]:
        """`directories`, parsed."""
        assert isinstance(self.directories, tuple), "they are parsed when the options are made"
        return self.directories

    @property
    def capacity_bytes(self) -> int:
        """Of all directories together."""
        return sum(place.capacity_bytes for place in self.places)

    @property
    def daily_bytes(self) -> int | None:
        """`write_bytes_per_day` as a number."""
        assert not isinstance(self.write_bytes_per_day, str), "sizes are parsed when the options are made"
        return self.write_bytes_per_day


AnySsd: TypeAlias = "str | SsdPlace | Sequence[str | SsdPlace] | SsdOptions"
"""What names an SSD tier: `/dir:200GiB`, several of them, or options."""
