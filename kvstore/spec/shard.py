"""How tensors split over tensor-parallel ranks, in units that no rank count can change.

A tensor's first axis is an ordered list of segments. A segment either splits into equal units (heads)
or replicates (a latent, a Mamba-2 group shared by all heads) and is then one unit, stored once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import SpecError
from kvstore.limits import SHARD_UNITS_MAX


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a tensor's first axis that split in one way.

    Attributes:
        name: what the rows are: `heads`, `query`, `latent` ...
        units: number of shard units; 1 if replicated.
        unit_rows: rows of the first axis per unit.
        replicated: every rank holds all rows; records hold them once.
    """

    name: str
    units: int
    unit_rows: int
    replicated: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SpecError(f"segment name {self.name!r} is not an identifier")
        # Equal numbers of other types would have another fingerprint.
        if type(self.units) is not int or type(self.unit_rows) is not int or type(self.replicated) is not bool:
            raise SpecError(
                f"segment {self.name!r}: units and unit_rows are whole numbers, replicated is true or false"
            )
        if not 1 <= self.units <= SHARD_UNITS_MAX:
            raise SpecError(f"segment {self.name!r} has {self.units} shard units; allowed are 1 to {SHARD_UNITS_MAX}")
        if self.unit_rows < 1:
            raise SpecError(f"segment {self.name!r} has {self.unit_rows} rows per unit; at least 1 is needed")
        if self.replicated and self.units != 1:
            raise SpecError(f"segment {self.name!r} is replicated, so it is one unit, not {self.units}")

    @property
    def rows(self) -> int:
        return self.units * self.unit_rows


@dataclass(frozen=True)
class Shard:
    """The position of one tensor-parallel worker: `index` of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise SpecError(f"shard index {self.index} of {self.count} is out of range")

    def units_of(self, segment: Segment) -> range:
        """Units of `segment` that this worker holds.

        With fewer units than workers, neighbouring workers hold the same unit (few KV heads replicate).

        Raises:
            SpecError: the units divide by neither rule.
        """
        units, count = segment.units, self.count
        if segment.replicated:
            return range(1)
        if units % count == 0:
            share = units // count
            return range(self.index * share, (self.index + 1) * share)
        if count % units == 0:
            unit = self.index * units // count
            return range(unit, unit + 1)
        raise SpecError(
            f"{units} units of segment {segment.name!r} split over {count} workers neither evenly nor by "
            "replication; use a worker count that divides the units, or a multiple of them"
        )


WHOLE = Shard()
"""A worker that holds everything."""


@dataclass(frozen=True, order=True)
class UnitRange:
    """Shard units `[start, stop)` of a group, the name of a shard in records, keys and on the wire."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= SHARD_UNITS_MAX:
            raise SpecError(f"shard units [{self.start}, {self.stop}) are not a range within 0 to {SHARD_UNITS_MAX}")

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, int) and self.start <= unit < self.stop

    def covers(self, other: UnitRange) -> bool:
        return self.start <= other.start and other.stop <= self.stop
