"""Messages by which an attached process finds records and holds them: packed tables, parsed with bounds checks."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.attached.tables import (
    MessageReader,
    PlacedRecord,
    pack_bytes,
    pack_chunks,
    pack_grids,
    pack_handover,
    pack_path,
    pack_places,
    pack_shard,
    read_chunks,
    read_grids,
    read_handover,
    read_path,
    read_places,
    read_salt,
    read_shard,
)
from kvstore.errors import SpecError
from kvstore.events import MissReason
from kvstore.keys import ExtraInput
from kvstore.limits import (
    ATTACH_TEXT_BYTES_MAX,
    CANDIDATES_MAX,
    EXTRA_BYTES_MAX,
    PROMPT_TOKENS_MAX,
    SALT_BYTES_MAX,
    SHELVES_MAX,
)
from kvstore.pool import Candidate, HandOver, Match, Missing, NodePath, Prompt
from kvstore.wire import clipped_utf8

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvstore.pool.path import RecordPlace
    from kvstore.spec import ChunkGrid, ModelSpec, Shard

REASONS_MAX = 64
NO_LENGTH = 0xFFFFFFFF
"""Stands for "everything" where a number of tokens is asked for; above every prompt's length."""
_PROMPT = struct.Struct("<IIIIB3x")
_EXTRA = struct.Struct("<II")
_MATCHED = struct.Struct("<IIIIII")
NUMBER_AND_TERM = struct.Struct("<QQ")
_CANDIDATE_ROW = np.dtype(
    [("path", "<u4"), ("blocks", "<u4"), ("tail_tokens", "<u4"), ("tier", "<u2"), ("is_durable", "<u2")]
)
_TIER = struct.Struct("<d")
_WAIT = struct.Struct("<I")
_STORED_COUNT = struct.Struct("<I")
WAIT_MS_MAX = 0xFFFFFFFF

assert NO_LENGTH > PROMPT_TOKENS_MAX


@dataclass(frozen=True)
class MatchRequest:
    """How much of a prompt is there?"""

    prompt: Prompt
    shard: Shard
    grid: ChunkGrid | None = None
    cap_tokens: int | None = None
    accept_coverage: bool = False

    def pack(self) -> bytes:
        prompt = self.prompt
        cap = NO_LENGTH if self.cap_tokens is None else max(0, min(self.cap_tokens, len(prompt)))
        adapter = prompt.adapter.encode()
        fixed = _PROMPT.pack(cap, len(prompt), len(adapter), len(prompt.extras), self.accept_coverage)
        parts = [fixed, pack_shard(self.shard), pack_chunks(self.grid), pack_path(prompt.path), pack_bytes(prompt.salt)]
        parts.append(adapter)
        parts.extend(_EXTRA.pack(extra.position, len(extra.data)) + extra.data for extra in prompt.extras)
        parts.append(prompt.token_ids.astype("<u4", copy=False).tobytes())
        return b"".join(parts)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec) -> MatchRequest:
        reader = MessageReader(data, "MATCH")
        cap, tokens, adapter_bytes, extra_count, accept_coverage = reader.fixed(_PROMPT)
        shard, grid, path = read_shard(reader), read_chunks(reader), read_path(reader, spec)
        salt = read_salt(reader)
        if path.tokens != tokens or adapter_bytes > SALT_BYTES_MAX or extra_count > PROMPT_TOKENS_MAX:
            raise reader.fail(f"has {tokens} tokens on a path of {path.tokens}, or too many other inputs")
        if accept_coverage > 1 or any(data[_PROMPT.size - 3 : _PROMPT.size]):
            raise reader.fail("has flags or reserved bytes that mean nothing")
        if cap not in range(tokens + 1) and cap != NO_LENGTH:
            raise reader.fail(f"asks for {cap} of {tokens} tokens")
        adapter = reader.text(adapter_bytes)
        extras = tuple(_read_extra(reader, tokens) for _ in range(extra_count))
        ids = reader.rows(np.dtype("<u4"), tokens)
        reader.finish()
        if tuple(ids[len(path.keys) * path.block_tokens :].tolist()) != path.tail_ids:
            raise reader.fail("has a tail whose ids are not the prompt's last ones")
        _check_shard(reader, spec, shard)
        prompt = Prompt(ids, salt, adapter, extras, path, path.masks)
        return cls(prompt, shard, grid, None if cap == NO_LENGTH else cap, bool(accept_coverage))


def _read_extra(reader: MessageReader, tokens: int) -> ExtraInput:
    position, size_bytes = reader.fixed(_EXTRA)
    if position >= tokens or size_bytes > EXTRA_BYTES_MAX:
        raise reader.fail(f"has an extra input of {size_bytes} bytes at token {position} of {tokens}")
    return ExtraInput(position, reader.bytes(size_bytes))


def _check_shard(reader: MessageReader, spec: ModelSpec, shard: Shard) -> None:
    try:
        for group in spec.groups:
            group.units_read_by(shard)
    except SpecError as error:
        raise reader.fail(str(error)) from error


def pack_match(match: Match) -> bytes:
    """The answer to `MatchRequest`.

    A candidate's path is the beginning of the request's own exact path or of one in a list, by number from 1; its tier
    is one in a list, by number from 0.
    """
    paths: list[NodePath] = []
    tiers: dict[str, int] = {}
    rows = np.array(
        [
            (
                _path_number(c.path, paths),
                len(c.path.keys),
                len(c.path.tail_ids),
                tiers.setdefault(c.tier, len(tiers)),
                c.is_durable,
            )
            for c in match.candidates
        ],
        _CANDIDATE_ROW,
    )
    reasons = [clipped_utf8(reason, ATTACH_TEXT_BYTES_MAX) for reason in match.missing.reasons[:REASONS_MAX]]
    fixed = _MATCHED.pack(
        match.missing.cap_tokens,
        match.missing.attention_tokens,
        match.pending_tokens,
        len(rows),
        len(reasons),
        len(match.suggested),
    )
    rates = match.load_seconds_per_byte or {}
    tier_rows = [pack_bytes(name.encode()) + _TIER.pack(rates.get(name, 0.0)) for name in tiers]
    suggested = np.array(match.suggested, "<u4").tobytes()
    packed_paths = struct.pack("<I", len(paths)) + b"".join(map(pack_path, paths))
    packed_tiers = struct.pack("<I", len(tiers)) + b"".join(tier_rows) + pack_bytes(match.missing.reason.encode())
    return b"".join((fixed, packed_tiers, rows.tobytes(), suggested, *map(pack_bytes, reasons), packed_paths))


def _path_number(path: NodePath, paths: list[NodePath]) -> int:
    """Of the path that another one is the beginning of: 0 for exact ones, or a number in the list, which grows."""
    if path.is_exact:
        return 0
    for number, known in enumerate(paths, start=1):
        if path == known or (not path.tail_ids and path == known.prefix(len(path))):
            return number
    paths.append(path)
    return len(paths)


def parse_match(data: memoryview, request: MatchRequest, spec: ModelSpec) -> Match:
    """The match that the owner found for a request of this process."""
    reader = MessageReader(data, "MATCH")
    cap, attention_tokens, pending_tokens, candidate_count, reason_count, suggested_count = reader.fixed(_MATCHED)
    if candidate_count > CANDIDATES_MAX or reason_count > REASONS_MAX or suggested_count > PROMPT_TOKENS_MAX:
        raise reader.fail(f"has {candidate_count} candidates, {reason_count} reasons, {suggested_count} suggestions")
    tiers = [_read_tier(reader) for _ in range(reader.count(SHELVES_MAX + 1, "tiers"))]
    reason = _read_reason(reader)
    rows = reader.rows(_CANDIDATE_ROW, candidate_count).tolist()
    suggested = tuple(reader.rows(np.dtype("<u4"), suggested_count).tolist())
    reasons = tuple(reader.text(reader.count(ATTACH_TEXT_BYTES_MAX, "bytes of a reason")) for _ in range(reason_count))
    paths = [read_path(reader, spec) for _ in range(reader.count(CANDIDATES_MAX, "paths"))]
    reader.finish()
    candidates = tuple(_candidate(reader, request, spec, row, paths, tiers) for row in rows)
    lengths = [candidate.tokens for candidate in candidates]
    may_repeat = any(not candidate.is_exact for candidate in candidates)
    if lengths != sorted(lengths if may_repeat else set(lengths), reverse=True) or max(cap, *suggested, 0) > len(
        request.prompt
    ):
        raise reader.fail("has candidates that are not ever shorter, or lengths past the prompt's end")
    return Match(
        tokens=lengths[0] if lengths else 0,
        candidates=candidates,
        missing=Missing(cap, attention_tokens, reason, reasons),
        pending_tokens=pending_tokens,
        suggested=suggested,
        shard=request.shard,
        grid=request.grid,
        load_seconds_per_byte={name: rate for name, rate in tiers if rate},
    )


def _read_tier(reader: MessageReader) -> tuple[str, float]:
    """A tier's name, and what loading from it costs."""
    name = reader.text(reader.count(ATTACH_TEXT_BYTES_MAX, "bytes of a name"))
    (rate,) = reader.fixed(_TIER)
    if not 0.0 <= rate < float("inf"):
        raise reader.fail(f"says that loading a byte takes {rate} s")
    return name, rate


def _read_reason(reader: MessageReader) -> MissReason:
    word = reader.text(reader.count(ATTACH_TEXT_BYTES_MAX, "bytes of a reason"))
    try:
        return MissReason(word)
    except ValueError as error:
        raise reader.fail(f"misses for a reason that is unknown here, {word!r}") from error


def _candidate(
    reader: MessageReader,
    request: MatchRequest,
    spec: ModelSpec,
    row: tuple[int, int, int, int, int],
    paths: list[NodePath],
    tiers: list[tuple[str, float]],
) -> Candidate:
    number, blocks, tail, tier, is_durable = row
    prompt, block = request.prompt.exact, spec.block_tokens
    tokens = blocks * block + tail
    if not 0 < tokens <= len(prompt) or tail >= block or number > len(paths):
        raise reader.fail(f"has a candidate of {tokens} tokens on path {number}, the prompt {len(prompt)}")
    if tier >= len(tiers) or is_durable > 1:
        raise reader.fail(f"has a candidate in tier {tier} of {len(tiers)}, or with a flag of {is_durable}")
    path = prompt.path
    if number:
        path = paths[number - 1]
        if tokens > path.tokens or (tail and tokens != path.tokens):
            raise reader.fail(f"has a candidate of {tokens} tokens on a path of {path.tokens}")
    if not tail:
        path = path.prefix(blocks)
    elif tokens != path.tokens:
        ids = tuple(prompt.token_ids[blocks * block : tokens].tolist())
        path = path.with_tail(blocks, prompt.tail_key(blocks, tokens), ids)
    return Candidate(tokens, path, spec.bytes_by_group(tokens, request.shard), tiers[tier][0], bool(is_durable))


# Holding


@dataclass(frozen=True)
class HoldRequest:
    """Keep the records of a resume point in place.

    Attributes:
        wait_ms: how long the answer may wait for what lies in another tier; loading it goes on afterwards.
    """

    path: NodePath
    shard: Shard
    grid: ChunkGrid | None = None
    grids: Mapping[RecordPlace, bytes] | None = None
    wait_ms: int = 0

    def pack(self) -> bytes:
        wait = _WAIT.pack(min(self.wait_ms, WAIT_MS_MAX))
        return wait + pack_shard(self.shard) + pack_chunks(self.grid) + pack_grids(self.grids) + pack_path(self.path)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec) -> HoldRequest:
        reader = MessageReader(data, "HOLD")
        (wait_ms,) = reader.fixed(_WAIT)
        shard, grid, grids, path = (
            read_shard(reader),
            read_chunks(reader),
            read_grids(reader),
            read_path(reader, spec),
        )
        reader.finish()
        _check_shard(reader, spec, shard)
        return cls(path, shard, grid, grids, wait_ms)


@dataclass(frozen=True)
class Held:
    """Records that stay until they are released, by `number`, or until the process's term ends."""

    number: int
    term: int
    salt: bytes
    handover: HandOver | None
    records: tuple[PlacedRecord, ...]

    def pack(self) -> bytes:
        parts = (pack_bytes(self.salt), pack_handover(self.handover), pack_places(self.records))
        return NUMBER_AND_TERM.pack(self.number, self.term) + b"".join(parts)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec, path: NodePath, arena_bytes: int) -> Held:
        reader = MessageReader(data, "HOLD")
        held = cls.read(reader, spec, path, arena_bytes)
        reader.finish()
        return held

    @classmethod
    def read(cls, reader: MessageReader, spec: ModelSpec, path: NodePath, arena_bytes: int) -> Held:
        number, term = reader.fixed(NUMBER_AND_TERM)
        salt, handover = read_salt(reader), read_handover(reader)
        return cls(number, term, salt, handover, tuple(read_places(reader, spec, path, arena_bytes)))


@dataclass(frozen=True)
class Accepted:
    """The answer to ACCEPT, if a hand-over waited."""

    handover: HandOver
    grids: Mapping[RecordPlace, bytes]
    held: Held

    def pack(self) -> bytes:
        return pack_handover(self.handover) + pack_grids(self.grids) + self.held.pack()

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec, path: NodePath, arena_bytes: int) -> Accepted | None:
        """None if nothing waited: the message is empty."""
        if not data.nbytes:
            return None
        reader = MessageReader(data, "ACCEPT")
        handover, grids = read_handover(reader), read_grids(reader)
        if handover is None or grids is None:
            raise reader.fail("has no hand-over")
        held = Held.read(reader, spec, path, arena_bytes)
        reader.finish()
        return cls(handover, grids, held)


@dataclass(frozen=True)
class HandOverMessage:
    """A hand-over that goes back, or that was taken (then without grids)."""

    path: NodePath
    handover: HandOver | None
    grids: Mapping[RecordPlace, bytes] | None = None

    def pack(self) -> bytes:
        return pack_path(self.path) + pack_handover(self.handover) + pack_grids(self.grids)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec) -> HandOverMessage:
        reader = MessageReader(data, "RETURN")
        message = cls(read_path(reader, spec), read_handover(reader), read_grids(reader))
        reader.finish()
        return message


def parse_path(data: memoryview, spec: ModelSpec, message: str) -> NodePath:
    """A message that is a path."""
    reader = MessageReader(data, message)
    path = read_path(reader, spec)
    reader.finish()
    return path


STORED_NODES_MAX = 4096
"""Nodes of the paths of one STORED, which the owner looks for under its lock."""


def stored_parts(paths: Sequence[NodePath]) -> Iterator[Sequence[NodePath]]:
    """As many paths at a time as one STORED names; a longer one goes by itself."""
    first, nodes = 0, 0
    for number, path in enumerate(paths):
        if number > first and nodes + len(path) > STORED_NODES_MAX:
            yield paths[first:number]
            first, nodes = number, 0
        nodes += len(path)
    if first < len(paths):
        yield paths[first:]


def pack_stored(paths: Sequence[NodePath]) -> bytes:
    """STORED: which of these paths are there?"""
    return b"".join([_STORED_COUNT.pack(len(paths)), *map(pack_path, paths)])


def parse_stored(data: memoryview, spec: ModelSpec) -> list[NodePath]:
    """What `pack_stored` packed."""
    reader = MessageReader(data, "STORED")
    paths = [read_path(reader, spec) for _ in range(reader.count(STORED_NODES_MAX, "paths"))]
    reader.finish()
    return paths


def parse_flags(data: memoryview, count: int, message: str) -> list[bool]:
    """An answer of one flag for each of so many things."""
    reader = MessageReader(data, message)
    flags = [reader.flag() for _ in range(count)]
    reader.finish()
    return flags
