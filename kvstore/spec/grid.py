"""Chunk grids: at which lengths a prefill was cut into forward passes.

A cached prefix is bitwise that of an uncached run only if both were cut at the same lengths counted
from token 0. Each record therefore carries a digest of the boundaries that it was computed with; the
hashed bytes are specified in `docs/keys.md`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING

from kvstore.errors import SpecError
from kvstore.limits import PROMPT_TOKENS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

GRID_DOMAIN = b"kvstore.grid.v1\0"
GRID_DIGEST_BYTES = 32
UNKNOWN_GRID = bytes(GRID_DIGEST_BYTES)
"""Digest of a grid that nobody named. Two unknown grids need not be the same."""


@dataclass(frozen=True)
class ChunkGrid:
    """The ascending lengths at which the chunks of one run end; chunks follow each other from token 0.

    Length 0 is a boundary of every grid without being listed. Any thread may use a grid.

    Attributes:
        boundaries: ends of the chunks, each above the one before.

    Raises:
        SpecError: a boundary is no integer, below 1, above `PROMPT_TOKENS_MAX` or out of order.
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        previous = 0
        for boundary in self.boundaries:
            if isinstance(boundary, bool) or not isinstance(boundary, int):
                raise SpecError(f"a chunk boundary is a number of tokens, not {boundary!r}")
            if boundary <= previous:
                raise SpecError(
                    f"chunk boundary {boundary} does not lie above {previous}; list them in ascending order"
                )
            previous = boundary
        if previous > PROMPT_TOKENS_MAX:
            raise SpecError(f"chunk boundary {previous} is past the limit of {PROMPT_TOKENS_MAX} tokens")

    @classmethod
    def every(cls, chunk_tokens: int, *, upto: int) -> ChunkGrid:
        """The grid of a prompt of `upto` tokens in chunks of `chunk_tokens`; the last may be shorter.

        Raises:
            SpecError: `chunk_tokens` is below 1, or `upto` is negative or past the limit.
        """
        return cls(()).extended_to(upto, chunk_tokens)

    def extended_to(self, end: int, chunk_tokens: int) -> ChunkGrid:
        """The grid of a run that goes on from this one's end in chunks, the last of which ends at `end`.

        Raises:
            SpecError: `chunk_tokens` is below 1, or `end` lies before this grid's end or past the limit.
        """
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise SpecError(f"a chunk has a whole number of tokens, at least 1, not {chunk_tokens!r}")
        if not self.end <= end <= PROMPT_TOKENS_MAX:
            raise SpecError(f"a grid that ends at {self.end} extends to at most {PROMPT_TOKENS_MAX}, not to {end}")
        if end == self.end:
            return self
        return ChunkGrid((*self.boundaries, *range(self.end + chunk_tokens, end, chunk_tokens), end))

    def up_to(self, boundary: int) -> ChunkGrid:
        """The part of this grid that ends at `boundary`.

        Raises:
            SpecError: it is no boundary of this grid.
        """
        return ChunkGrid(self.boundaries[: self._index(boundary)])

    @property
    def end(self) -> int:
        """The last boundary; 0 for a grid without chunks."""
        return self.boundaries[-1] if self.boundaries else 0

    def has(self, boundary: int) -> bool:
        """Whether a chunk ends at this length; true for 0."""
        index = bisect_left(self.boundaries, boundary)
        return boundary == 0 or (index < len(self.boundaries) and self.boundaries[index] == boundary)

    def closing(self, end: int) -> int | None:
        """The smallest boundary at or past `end`: where the chunk that holds token `end - 1` ends.

        None when the grid ends before. The bytes of a block that ends at `end` depend on all boundaries
        up to this one.
        """
        if end <= 0:
            return 0
        index = bisect_left(self.boundaries, end)
        return self.boundaries[index] if index < len(self.boundaries) else None

    def chunks(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """The chunks from the boundary `start` on, as `(start, end)` pairs.

        Raises:
            SpecError: `start` is no boundary of this grid.
        """
        return pairwise((start, *self.boundaries[self._index(start) :]))

    def digest_at(self, boundary: int) -> bytes:
        """Digest of all boundaries up to and including this one, 32 bytes.

        Grids that agree up to a boundary have the same digest there, wherever else they are cut.

        Raises:
            SpecError: it is no boundary of this grid.
        """
        return self._digests[self._index(boundary)]

    @cached_property
    def _digests(self) -> tuple[bytes, ...]:
        digests = [sha256(GRID_DOMAIN).digest()]
        for boundary in self.boundaries:
            digests.append(sha256(GRID_DOMAIN + digests[-1] + boundary.to_bytes(4, "little")).digest())
        return tuple(digests)

    @cached_property
    def packed(self) -> tuple[bytes, bytes]:
        """The boundaries as 32-bit integers, and the digests at 0 and at each of them: what native calls take."""
        return array("I", self.boundaries).tobytes(), b"".join(self._digests)

    def _index(self, boundary: int) -> int:
        """Number of chunks that end at or before `boundary`, which must be one."""
        if not self.has(boundary):
            raise SpecError(
                f"no chunk ends at length {boundary}; the next boundary of this grid is {self.closing(boundary)}"
            )
        return 0 if boundary == 0 else bisect_left(self.boundaries, boundary) + 1
