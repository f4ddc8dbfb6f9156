"""OFFER: what a sender has or will have, before a byte of it moves."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import ProtocolError, SpecError, TransferError
from kvstore.limits import (
    BLOCK_TOKENS_MAX,
    CHECKPOINTS_PER_WRITE_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    OFFER_RECORDS_MAX,
    PROMPT_TOKENS_MAX,
    SALT_BYTES_MAX,
)
from kvstore.pool.path import NodePath, RecordName
from kvstore.record import record_layout
from kvstore.spec import CacheGroup, ModelSpec, ReuseRule, UnitRange
from kvstore.transfer.pieces import pieces_bytes
from kvstore.transfer.wire import Reader, check_zero

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.record import RecordHeader, RecordLayout
    from kvstore.transfer.messages import Rows

GRIDS_MAX = 4096
"""Different chunk grids within one offer."""
KEY_BYTES = 32

CODEC_RAW = 0
COVERAGE_ALL = 0

OFFER_RECORD = np.dtype(
    [
        ("node", "<u4"),
        ("group", "<u2"),
        ("span", "<u2"),
        ("unit_start", "<u2"),
        ("unit_stop", "<u2"),
        ("grid", "<u2"),
        ("codec", "u1"),
        ("coverage", "u1"),
        ("pieces", "<u4"),
        ("valid_tokens", "<u4"),
        ("size_bytes", "<u8"),
    ]
)
_OFFER = struct.Struct("<HHHHIIIIQIIB7x")

assert OFFER_RECORD.itemsize == 32


class OfferFlag(enum.IntFlag):
    """What kind of offer it is."""

    HANDOVER = 1
    """A hand-over: a tail that exists only for it disappears once it is claimed."""
    COMPLETE = 2
    """Every piece and its checksum exist already; otherwise they come while they are computed."""


@dataclass(frozen=True)
class Offer:
    """One transfer's plan.

    Attributes:
        path: keys of the prefix nodes; the resume points lie on it.
        salt: whose prefix it is.
        resume_tokens: lengths at which states are offered, ascending.
        grids: digests of chunk grids, referred to by the records.
        records: rows of `OFFER_RECORD`; their positions name them in later frames.
        total_bytes: of all pieces.
        total_deadline_ms: the sender gives up this long after its offer.
        priority: 0 (first) to 255.
        flags: `OfferFlag` bits.
    """

    path: NodePath
    salt: bytes
    resume_tokens: tuple[int, ...]
    grids: tuple[bytes, ...]
    records: Rows
    total_bytes: int
    total_deadline_ms: int
    priority: int
    flags: OfferFlag

    def pack(self) -> bytes:
        """Raises `TransferError` when one frame cannot hold it."""
        path = self.path
        fixed = _OFFER.pack(
            self.flags,
            len(self.salt),
            path.block_tokens,
            len(path.tail_ids),
            len(path.keys),
            len(self.resume_tokens),
            len(self.grids),
            len(self.records),
            self.total_bytes,
            min(self.total_deadline_ms, 0xFFFFFFFF),
            0,
            self.priority,
        )
        parts = [fixed, path.root, path.tail_key or b"", *path.keys]
        parts.append(np.array(path.tail_ids, "<u4").tobytes())
        parts.append(np.array(self.resume_tokens, "<u4").tobytes())
        parts.extend(self.grids)
        parts.append(self.records.tobytes())
        parts.append(self.salt)
        packed = b"".join(parts)
        if len(packed) > FRAME_PAYLOAD_BYTES_MAX or len(self.records) > OFFER_RECORDS_MAX:
            raise TransferError(
                f"the offer names {len(self.records)} records in {len(packed)} bytes; the limits are "
                f"{OFFER_RECORDS_MAX} and {FRAME_PAYLOAD_BYTES_MAX}: send a shorter prefix, or use larger blocks"
            )
        return packed

    @classmethod
    def parse(cls, data: memoryview) -> Offer:
        """Check everything that can be checked without the spec.

        Raises:
            ProtocolError: not an offer that version 1 allows.
        """
        reader = Reader(data, "OFFER")
        counts = reader.fixed(_OFFER)
        flags, salt_bytes, block, tail, keys, resumes, grids, records, total, deadline_ms, zero, priority = counts
        check_zero("OFFER", zero, any(data[_OFFER.size - 7 : _OFFER.size]), flags & ~3)
        _check_count("tokens per block", block, 1, BLOCK_TOKENS_MAX)
        _check_count("salt bytes", salt_bytes, 0, SALT_BYTES_MAX)
        _check_count("tail tokens", tail, 0, block - 1)
        _check_count("tokens", keys * block + tail, 1, PROMPT_TOKENS_MAX)
        _check_count("resume points", resumes, 0, CHECKPOINTS_PER_WRITE_MAX)
        _check_count("chunk grids", grids, 0, GRIDS_MAX)
        _check_count("records", records, 0, OFFER_RECORDS_MAX)
        root = reader.bytes(KEY_BYTES)
        tail_key = reader.bytes(KEY_BYTES) if tail else None
        key_bytes = reader.bytes(KEY_BYTES * keys)
        tail_ids = tuple(reader.rows(np.dtype("<u4"), tail).tolist())
        resume_tokens = tuple(reader.rows(np.dtype("<u4"), resumes).tolist())
        grid_bytes = reader.bytes(KEY_BYTES * grids)
        rows = reader.rows(OFFER_RECORD, records)
        salt = reader.bytes(salt_bytes)
        reader.finish()
        path = NodePath(root, block, _digests(key_bytes), tail_key, tail_ids)
        if list(resume_tokens) != sorted(set(resume_tokens)) or any(path.node_at(n) is None for n in resume_tokens):
            raise ProtocolError("OFFER names resume points that are not ascending ends of its prefix nodes")
        grid_digests = _digests(grid_bytes)
        return cls(path, salt, resume_tokens, grid_digests, rows, total, deadline_ms, priority, OfferFlag(flags))


@dataclass(frozen=True)
class OfferedRecord:
    """One row of an offer, after it was found to agree with the spec."""

    name: RecordName
    layout: RecordLayout
    grid: bytes
    valid_tokens: int


def offer_rows(
    records: Sequence[tuple[RecordName, RecordLayout, RecordHeader]],
) -> tuple[Rows, tuple[bytes, ...]]:
    """The rows and grids that describe records."""
    grids: dict[bytes, int] = {}
    rows = []
    for name, layout, header in records:
        grid = grids.setdefault(header.grid, len(grids))
        units, pieces = name.units, len(layout.pieces)
        record = (name.node, name.group, name.span, units.start, units.stop, grid, CODEC_RAW, COVERAGE_ALL)
        rows.append((*record, pieces, header.valid_tokens, pieces_bytes(layout)))
    if len(grids) > GRIDS_MAX:
        raise TransferError(f"the records come from {len(grids)} chunk grids, the limit is {GRIDS_MAX}")
    return np.array(rows, OFFER_RECORD), tuple(grids)


def check_offer(offer: Offer, spec: ModelSpec) -> tuple[OfferedRecord, ...]:
    """The offered records as this side's spec understands them.

    Raises:
        ProtocolError: a record that the spec does not have, or described otherwise than the spec does.
    """
    path = offer.path
    if path.block_tokens != spec.block_tokens:
        raise ProtocolError(f"OFFER has {path.block_tokens} tokens per block, the spec {spec.block_tokens}")
    checked: list[OfferedRecord] = []
    seen: set[RecordName] = set()
    classes: dict[tuple[int, int, int, int], _RecordClass] = {}
    ends = [path.end_tokens(node) for node in range(len(path))]
    resume_tokens = frozenset(offer.resume_tokens)
    total_bytes = 0
    for number, row in enumerate(offer.records.tolist()):
        node, group, span, unit_start, unit_stop, grid, codec, coverage, pieces, valid_tokens, size_bytes = row
        what = f"record {number} of the offer"
        if node >= len(ends) or group >= len(spec.groups) or span >= len(spec.spans[group]):
            raise ProtocolError(f"{what} names node {node}, group {group}, span {span}, which do not exist")
        if grid >= len(offer.grids):
            raise ProtocolError(f"{what} names chunk grid {grid} of {len(offer.grids)}")
        if codec != CODEC_RAW or coverage != COVERAGE_ALL:
            raise ProtocolError(f"{what} has codec {codec} and coverage {coverage}; version 1 moves raw, whole records")
        key = (group, span, unit_start, unit_stop)
        if (known := classes.get(key)) is None:
            known = classes[key] = _record_class(spec, key, what)
        name = RecordName(node, group, span, known.units)
        if name in seen:
            raise ProtocolError(f"{what} is named twice")
        seen.add(name)
        end_tokens = ends[node]
        if (pieces, size_bytes) != (known.pieces, known.size_bytes):
            raise ProtocolError(
                f"{what} has {pieces} pieces of {size_bytes} bytes in all; the spec says {known.pieces} pieces"
            )
        if valid_tokens != known.group.valid_tokens(spec.block_tokens, end_tokens):
            raise ProtocolError(f"{what} holds {valid_tokens} tokens at length {end_tokens}, which the spec does not")
        if known.group.rule is ReuseRule.STATE and end_tokens not in resume_tokens:
            raise ProtocolError(f"{what} is a state at length {end_tokens}, which is no resume point of the offer")
        total_bytes += size_bytes
        checked.append(OfferedRecord(name, known.layout, offer.grids[grid], valid_tokens))
    if total_bytes != offer.total_bytes:
        raise ProtocolError(f"OFFER claims {offer.total_bytes} bytes, its records add up to {total_bytes}")
    return tuple(checked)


@dataclass(frozen=True)
class _RecordClass:
    """What records of one group, span and units have in common."""

    units: UnitRange
    group: CacheGroup
    layout: RecordLayout
    pieces: int
    size_bytes: int


def _record_class(spec: ModelSpec, key: tuple[int, int, int, int], what: str) -> _RecordClass:
    """Raises `ProtocolError` for units that the spec does not have."""
    group_index, span, unit_start, unit_stop = key
    group = spec.groups[group_index]
    try:
        units = UnitRange(unit_start, unit_stop)
    except SpecError as error:
        raise ProtocolError(f"{what}: {error}") from error
    if unit_stop > group.unit_count:
        raise ProtocolError(f"{what} names shard unit {unit_stop - 1} of {group.unit_count}")
    layout = record_layout(spec, group_index, span, units)
    return _RecordClass(units, group, layout, len(layout.pieces), pieces_bytes(layout))


def _digests(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES))


def _check_count(what: str, count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise ProtocolError(f"OFFER has {count} {what}; allowed are {least} to {most}")
