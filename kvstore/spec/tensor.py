"""One tensor of a cache layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from kvstore.errors import SpecError
from kvstore.spec.dtypes import DType

if TYPE_CHECKING:
    from kvstore.spec.shard import Segment


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and canonical shape of one tensor of a layer.

    The canonical shape is `[rows, *inner]`, or `[rows, tokens, *inner]` with a token axis: the shard
    axis lies outermost, so that a rank's share of a layer is contiguous.

    Attributes:
        name: `keys`, `values`, `conv`, `recurrent` ...
        dtype: logical element type.
        segments: the rows of the first axis, in order.
        inner: the axes after rows and tokens; empty for one scalar per row (and token).
        has_tokens: whether the tensor has a token axis (attention blocks and windows).
    """

    name: str
    dtype: DType
    segments: tuple[Segment, ...]
    inner: tuple[int, ...]
    has_tokens: bool

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SpecError(f"tensor name {self.name!r} is not an identifier")
        if not isinstance(self.dtype, DType):
            raise SpecError(f"tensor {self.name!r}: {self.dtype!r} is no kvstore.spec.DType; write DType.BFLOAT16, say")
        if not isinstance(self.segments, tuple) or not isinstance(self.inner, tuple):
            raise SpecError(f"tensor {self.name!r}: segments and inner are tuples; write (segment,) and (size,)")
        if not self.segments:
            raise SpecError(f"tensor {self.name!r} has no segments")
        # Equal numbers of other types would have another fingerprint.
        if type(self.has_tokens) is not bool or not all(type(size) is int for size in self.inner):
            raise SpecError(f"tensor {self.name!r}: inner holds whole numbers, has_tokens is true or false")
        if any(size < 1 for size in self.inner):
            raise SpecError(f"tensor {self.name!r} has an empty axis in {self.inner}")

    @cached_property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row of one token (or of one row, without a token axis)."""
        return prod(self.inner) * self.dtype.itemsize

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Canonical shape for a number of rows and tokens."""
        return (rows, tokens, *self.inner) if self.has_tokens else (rows, *self.inner)

    def unit_bytes(self, segment: Segment, tokens: int) -> int:
        """Bytes of one shard unit of one layer: the size of a piece."""
        return segment.unit_rows * self.row_bytes * (tokens if self.has_tokens else 1)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the whole tensor of one layer."""
        return self.rows * self.row_bytes * (tokens if self.has_tokens else 1)
