"""Cache groups: layers whose cache has one shape and one reuse rule."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING

from kvstore.errors import SpecError
from kvstore.limits import RECORD_BYTES_MAX, SHARD_UNITS_MAX, SPAN_BYTES_MAX, TENSORS_PER_GROUP_MAX
from kvstore.spec.shard import WHOLE, Segment, Shard, UnitRange

if TYPE_CHECKING:
    from kvstore.spec.tensor import TensorSpec


class ReuseRule(enum.Enum):
    """When a stored value may be used again."""

    ATTENTION = "attention"
    """A block per `block_tokens`, usable for every prefix that contains it."""
    STATE = "state"
    """One value at one exact length: recurrent and convolution states, and windows."""


@dataclass(frozen=True)
class LayerSpan:
    """Consecutive layers of a group that share a record. `index` counts spans within the group."""

    index: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class CacheGroup:
    """Layers with tensors of one shape and one reuse rule.

    Attributes:
        name: unique within the spec.
        rule: attention or state.
        layers: model layer numbers, ascending.
        tensors: the tensors of each layer, in storage order.
        window_tokens: for a sliding or chunked window, the most tokens its state holds (the window
            less one); None otherwise. Its tensors have a token axis and a valid length.
    """

    name: str
    rule: ReuseRule
    layers: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, ReuseRule):
            raise SpecError(
                f"group {self.name!r}: {self.rule!r} is no kvstore.spec.ReuseRule; write ReuseRule.ATTENTION"
            )
        if not isinstance(self.layers, tuple) or not isinstance(self.tensors, tuple):
            raise SpecError(f"group {self.name!r}: layers and tensors are tuples; write (number,) and (tensor,)")
        if not all(type(number) is int for number in (*self.layers, self.window_tokens or 0)):
            raise SpecError(f"group {self.name!r}: layers and window_tokens are whole numbers")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise SpecError(f"group {self.name!r} needs ascending layer numbers, got {self.layers}")
        if not 1 <= len(self.tensors) <= TENSORS_PER_GROUP_MAX:
            raise SpecError(f"group {self.name!r} has {len(self.tensors)} tensors; 1 to {TENSORS_PER_GROUP_MAX}")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise SpecError(f"group {self.name!r} names a tensor twice")
        if self.window_tokens is not None and (self.rule is not ReuseRule.STATE or self.window_tokens < 1):
            raise SpecError(f"group {self.name!r}: only a state group has a window, of at least one token")
        wants_tokens = self.rule is ReuseRule.ATTENTION or self.window_tokens is not None
        for tensor in self.tensors:
            if tensor.has_tokens != wants_tokens:
                word = "needs" if wants_tokens else "must not have"
                raise SpecError(f"group {self.name!r}: tensor {tensor.name!r} {word} a token axis")
        if self.unit_count > SHARD_UNITS_MAX:
            raise SpecError(
                f"group {self.name!r} has {self.unit_count} common shard units, the limit is {SHARD_UNITS_MAX}; "
                "use segments with larger units"
            )

    def capacity_tokens(self, block_tokens: int) -> int:
        """Tokens that one record of this group has room for; 0 without a token axis."""
        if self.rule is ReuseRule.ATTENTION:
            return block_tokens
        return self.window_tokens or 0

    def valid_tokens(self, block_tokens: int, end_tokens: int) -> int:
        """Tokens that the record ending at `end_tokens` really holds; 0 without a token axis."""
        if self.rule is ReuseRule.ATTENTION:
            return (end_tokens - 1) % block_tokens + 1
        return min(end_tokens, self.window_tokens or 0)

    @cached_property
    def unit_count(self) -> int:
        """Shard units of the group: the coarsest split that every segment's units fit into."""
        return lcm(*(segment.units for tensor in self.tensors for segment in tensor.segments))

    @property
    def all_units(self) -> UnitRange:
        return UnitRange(0, self.unit_count)

    def segment_units(self, segment: Segment, units: UnitRange) -> range:
        """Units of `segment` that a record of the group's `units` holds.

        Unit j of a segment with n units lies in the record that holds group unit j * unit_count / n, and
        nowhere else; so what replicates (n = 1) lies with group unit 0.
        """
        step = self.unit_count // segment.units
        return range(-(-units.start // step), -(-units.stop // step))

    def units_read_by(self, shard: Shard) -> frozenset[int]:
        """Group units whose records a worker must have to restore its share."""
        return frozenset(
            unit * (self.unit_count // segment.units)
            for tensor in self.tensors
            for segment in tensor.segments
            for unit in shard.units_of(segment)
        )

    def units_written_by(self, shard: Shard) -> UnitRange | None:
        """Group units that a worker stores; None when neighbours that hold the same rows do.

        Raises:
            SpecError: the group's units cannot be written by this many workers.
        """
        count = self.unit_count
        if count % shard.count == 0:
            share = count // shard.count
            units = UnitRange(shard.index * share, (shard.index + 1) * share)
        elif shard.count % count == 0:
            copies = shard.count // count
            if shard.index % copies:
                return None
            units = UnitRange(shard.index // copies, shard.index // copies + 1)
        else:
            raise SpecError(
                f"group {self.name!r} has {count} shard units, which {shard.count} workers cannot write; "
                "use a worker count that divides the units, or a multiple of them"
            )
        segments = (segment for tensor in self.tensors for segment in tensor.segments)
        return units if any(len(self.segment_units(segment, units)) for segment in segments) else None

    def layer_bytes(self, block_tokens: int) -> int:
        """Bytes of one layer's tensors in one record that holds every unit."""
        return sum(tensor.nbytes(self.capacity_tokens(block_tokens)) for tensor in self.tensors)

    def prefix_bytes(self, tokens: int, shard: Shard = WHOLE) -> int:
        """Bytes of this group's cache for a worker after a prefix: all tokens, or the one state at its end."""
        held = tokens if self.rule is ReuseRule.ATTENTION else min(tokens, self.window_tokens or 0)
        per_layer = 0
        for tensor in self.tensors:
            rows = sum(len(shard.units_of(segment)) * segment.unit_rows for segment in tensor.segments)
            per_layer += rows * tensor.row_bytes * (held if tensor.has_tokens else 1)
        return per_layer * len(self.layers)

    def spans(self, block_tokens: int) -> tuple[LayerSpan, ...]:
        """The group's layers cut into records of at most `SPAN_BYTES_MAX`.

        Spans do not depend on sharding: differently sharded engines must find each other's records.

        Raises:
            SpecError: one layer alone is larger than the largest record.
        """
        layer_bytes = self.layer_bytes(block_tokens)
        if layer_bytes > RECORD_BYTES_MAX:
            raise SpecError(
                f"group {self.name!r}: one layer's record would take {layer_bytes} bytes, the limit is "
                f"{RECORD_BYTES_MAX}; use smaller blocks, or split the layer's tensors into several groups"
            )
        per_span = max(1, SPAN_BYTES_MAX // layer_bytes)
        return tuple(
            LayerSpan(index, self.layers[start : start + per_span])
            for index, start in enumerate(range(0, len(self.layers), per_span))
        )
