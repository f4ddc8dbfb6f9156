"""QUERY, CANDIDATES and FETCH: what another node has of a prompt, and asking it to send that (docs/protocol.md)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import ProtocolError, TransferError
from kvstore.keys import ExtraInput
from kvstore.limits import (
    CANDIDATES_MAX,
    CONNECTIONS_PER_TRANSFER_MAX,
    EXTRA_BYTES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    PROMPT_TOKENS_MAX,
    QUERY_PARTS_MAX,
    SALT_BYTES_MAX,
)
from kvstore.pool import Prompt
from kvstore.spec import WHOLE, ChunkGrid, Shard
from kvstore.wire import Reader, check_zero

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.spec import ModelSpec

FLAG_GRID = 1
"""QUERY: chunk boundaries follow, and records that were computed on others do not count."""
SHARDS_MAX = 0xFFFF
TIERS = ("dram", "ssd", "gpu")
"""Their positions are on the wire."""
TIER_OTHER = 255

_QUERY = struct.Struct("<HHHHHHIIIII")
_EXTRA_ROW = np.dtype([("position", "<u4"), ("size_bytes", "<u4")])
_CANDIDATES = struct.Struct("<II")
_CANDIDATE = struct.Struct("<IB3xQQ")
_FETCH = struct.Struct("<IIBBHI")
_ID = np.dtype("<u4")


@dataclass(frozen=True, eq=False)
class Query:
    """What is there of a prompt? It carries the prompt itself, and the node that is asked computes the keys.

    Attributes:
        token_ids: `[tokens]`; at most one token less than there are can match.
        salt, adapter, extras: what it is cached under.
        shard: the tensor-parallel position whose share is asked for.
        grid: chunk boundaries to insist on; None takes any.
        candidates_max: the most candidates that the answer may have.
    """

    token_ids: npt.NDArray[np.uint32]
    salt: bytes = b""
    adapter: str = ""
    extras: tuple[ExtraInput, ...] = ()
    shard: Shard = WHOLE
    grid: ChunkGrid | None = None
    candidates_max: int = CANDIDATES_MAX

    @classmethod
    def of(cls, prompt: Prompt, shard: Shard, grid: ChunkGrid | None) -> Query:
        """The question about a prompt."""
        return cls(prompt.token_ids, prompt.salt, prompt.adapter, prompt.extras, shard, grid)

    def prompt(self, spec: ModelSpec) -> Prompt:
        """The prompt with the keys that this side computes for it.

        Raises:
            TokenError: its extra inputs stand outside of it, or are too large.
        """
        return Prompt.of(spec, self.token_ids, salt=self.salt, adapter=self.adapter, extras=self.extras)

    def pack(self) -> bytes:
        """Raises `TransferError` when it is more than a node takes in one question."""
        adapter = self.adapter.encode()
        boundaries = () if self.grid is None else self.grid.boundaries
        for what, count in (("chunk boundaries", len(boundaries)), ("extra inputs", len(self.extras))):
            if count > QUERY_PARTS_MAX:
                raise TransferError(
                    f"a question with {count} {what} cannot be asked, the limit is {QUERY_PARTS_MAX}: ask for a "
                    "shorter prefix, or name fewer"
                )
        if self.shard.count > SHARDS_MAX:
            raise TransferError(f"a shard of {self.shard.count} cannot be asked for; the limit is {SHARDS_MAX}")
        fixed = _QUERY.pack(
            0 if self.grid is None else FLAG_GRID,
            len(self.salt),
            len(adapter),
            0,
            self.shard.index,
            self.shard.count,
            self.candidates_max,
            len(self.token_ids),
            len(boundaries),
            len(self.extras),
            0,
        )
        rows = np.array([(extra.position, len(extra.data)) for extra in self.extras], _EXTRA_ROW)
        parts = [fixed, self.token_ids.astype(_ID).tobytes(), np.array(boundaries, _ID).tobytes(), rows.tobytes()]
        packed = b"".join([*parts, *(extra.data for extra in self.extras), self.salt, adapter])
        if len(packed) > FRAME_PAYLOAD_BYTES_MAX:
            raise TransferError(
                f"the question about {len(self.token_ids)} tokens takes {len(packed)} bytes, the limit is "
                f"{FRAME_PAYLOAD_BYTES_MAX}: ask for a shorter prefix, or pass digests as extra inputs"
            )
        return packed

    @classmethod
    def parse(cls, data: memoryview) -> Query:
        """Raises `ProtocolError` for anything that version 1 does not allow."""
        reader = Reader(data, "QUERY")
        fixed = reader.fixed(_QUERY)
        flags, salt_bytes, adapter_bytes, zero, index, count, candidates_max, tokens, cuts, extra_count, zero2 = fixed
        check_zero("QUERY", zero, zero2, flags & ~FLAG_GRID)
        _check_range("salt bytes", salt_bytes, 0, SALT_BYTES_MAX)
        _check_range("bytes of the adapter's name", adapter_bytes, 0, SALT_BYTES_MAX)
        _check_range("shards", count, index + 1, SHARDS_MAX)
        _check_range("candidates", candidates_max, 1, CANDIDATES_MAX)
        _check_range("tokens", tokens, 1, PROMPT_TOKENS_MAX)
        _check_range("chunk boundaries", cuts, 0, QUERY_PARTS_MAX)
        _check_range("extra inputs", extra_count, 0, QUERY_PARTS_MAX)
        if cuts and not flags & FLAG_GRID:
            raise ProtocolError(f"QUERY has {cuts} chunk boundaries without insisting on them")
        ids = reader.rows(_ID, tokens)
        boundaries = tuple(reader.rows(_ID, cuts).tolist())
        if (
            any(low >= high for low, high in pairwise((0, *boundaries)))
            or max(boundaries, default=0) > PROMPT_TOKENS_MAX
        ):
            raise ProtocolError("QUERY has chunk boundaries that do not ascend, or lie past any prompt")
        extras = _parse_extras(reader, extra_count)
        salt = reader.bytes(salt_bytes)
        try:
            adapter = reader.bytes(adapter_bytes).decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"QUERY names an adapter that is no UTF-8: {error}") from error
        reader.finish()
        if any(extra.position >= tokens for extra in extras):
            raise ProtocolError("QUERY has an extra input past its tokens")
        grid = ChunkGrid(boundaries) if flags & FLAG_GRID else None
        return cls(ids, salt, adapter, extras, Shard(index, count), grid, candidates_max)


def _parse_extras(reader: Reader, count: int) -> tuple[ExtraInput, ...]:
    rows = reader.rows(_EXTRA_ROW, count).tolist()
    extras: list[ExtraInput] = []
    for position, size_bytes in rows:
        if size_bytes > EXTRA_BYTES_MAX or position >= PROMPT_TOKENS_MAX:
            raise ProtocolError(f"QUERY has an extra input of {size_bytes} bytes at {position}")
        extras.append(ExtraInput(position, reader.bytes(size_bytes)))
    return tuple(extras)


def _check_range(what: str, count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise ProtocolError(f"QUERY has {count} {what}; allowed are {least} to {most}")


@dataclass(frozen=True)
class RemoteCandidate:
    """A resume point that another node has.

    Attributes:
        tokens: its length.
        tier: the slowest tier that any of it lies in: one of `TIERS`, or `other`.
        size_bytes: what restoring moves.
        ready_us: microseconds until the node expects that its bytes could begin to leave.
    """

    tokens: int
    tier: str
    size_bytes: int
    ready_us: int = 0


@dataclass(frozen=True)
class Candidates:
    """The answer to a question: resume points, deepest first; none is a miss.

    Attributes:
        pending_tokens: a deeper resume point that a writer of the node will commit; 0 if none. Never a hit.
    """

    candidates: tuple[RemoteCandidate, ...] = ()
    pending_tokens: int = 0

    def pack(self) -> bytes:
        parts = [_CANDIDATES.pack(len(self.candidates), self.pending_tokens)]
        for each in self.candidates:
            tier = TIERS.index(each.tier) if each.tier in TIERS else TIER_OTHER
            parts.append(_CANDIDATE.pack(each.tokens, tier, each.size_bytes, each.ready_us))
        return b"".join(parts)

    @classmethod
    def parse(cls, data: memoryview) -> Candidates:
        reader = Reader(data, "CANDIDATES")
        count, pending_tokens = reader.fixed(_CANDIDATES)
        if count > CANDIDATES_MAX:
            raise ProtocolError(f"CANDIDATES has {count} of them, the limit is {CANDIDATES_MAX}")
        candidates = []
        for _ in range(count):
            row = reader.bytes(_CANDIDATE.size)
            tokens, tier, size_bytes, ready_us = _CANDIDATE.unpack(row)
            check_zero("CANDIDATES", any(row[5:8]))
            if tier >= len(TIERS) and tier != TIER_OTHER:
                raise ProtocolError(f"CANDIDATES names the unknown tier {tier}")
            name = "other" if tier == TIER_OTHER else TIERS[tier]
            candidates.append(RemoteCandidate(tokens, name, size_bytes, ready_us))
        reader.finish()
        lengths = [each.tokens for each in candidates]
        if any(deeper <= other for deeper, other in pairwise(lengths)) or 0 in lengths:
            raise ProtocolError("CANDIDATES are not in descending order of their lengths")
        return cls(tuple(candidates), pending_tokens)


@dataclass(frozen=True)
class Fetch:
    """Send one of the candidates, as an offer on this connection.

    Attributes:
        tokens: length of the candidate.
        total_deadline_ms: when the requester gives up; the node's transfer ends by then.
        priority: 0 (first) to 255.
        connections: how many connections the requester is ready to open, the first one included.
    """

    tokens: int
    total_deadline_ms: int
    priority: int
    connections: int = 1

    def pack(self) -> bytes:
        return _FETCH.pack(self.tokens, self.total_deadline_ms, self.priority, self.connections, 0, 0)

    @classmethod
    def parse(cls, data: memoryview) -> Fetch:
        reader = Reader(data, "FETCH")
        tokens, total_deadline_ms, priority, connections, zero, zero2 = reader.fixed(_FETCH)
        reader.finish()
        check_zero("FETCH", zero, zero2)
        if not tokens or not total_deadline_ms or not 1 <= connections <= CONNECTIONS_PER_TRANSFER_MAX:
            raise ProtocolError(
                f"FETCH asks for {tokens} tokens within {total_deadline_ms} ms over {connections} connections"
            )
        return cls(tokens, total_deadline_ms, priority, connections)


assert _CANDIDATES.size + CANDIDATES_MAX * _CANDIDATE.size <= 2 << 10
