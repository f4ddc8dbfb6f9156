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
    LAYERS_MAX,
    OFFER_RECORDS_MAX,
    PROMPT_TOKENS_MAX,
    SALT_BYTES_MAX,
)
from kvstore.pool.arrays import RecordArrays
from kvstore.pool.path import NodePath, SparseNode, wrong_sparse
from kvstore.pool.rows import RecordNames, layouts_of, valid_tokens
from kvstore.record import record_layout
from kvstore.spec import UnitRange
from kvstore.transfer.pieces import pieces_bytes
from kvstore.wire import Reader, check_zero

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.spec import ModelSpec
    from kvstore.transfer.messages import Rows

GRIDS_MAX = 4096
"""Different chunk grids within one offer."""
KEY_BYTES = 32

CODEC_RAW = 0
COVERAGE_ALL = 0
COVERAGE_TOKENS = 1
"""The record's node is in the coverage table, which says which tokens each layer holds."""

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
NAME_FIELDS = ("node", "group", "span", "unit_start", "unit_stop")
_OFFER = struct.Struct("<HHHHIIIIQIIB7x")
_COVERAGE = struct.Struct("<II")
_SPARSE_NODE = struct.Struct("<I32s")

assert OFFER_RECORD.itemsize == 32


class OfferFlag(enum.IntFlag):
    """What kind of offer it is."""

    HANDOVER = 1
    """A hand-over: a tail that exists only for it disappears once it is claimed."""
    COMPLETE = 2
    """Every piece and its checksum exist already; otherwise they come while they are computed."""
    SPARSE = 4
    """Layers hold only some tokens of some blocks: a coverage table ends the offer. Only with `Feature.SPARSE`."""


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
        if path.sparse:
            parts.append(_COVERAGE.pack(len(path.sparse), len(path.sparse[0].mask)))
            parts.extend(_SPARSE_NODE.pack(each.node, each.whole_key) + each.mask for each in path.sparse)
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
        check_zero("OFFER", zero, any(data[_OFFER.size - 7 : _OFFER.size]), flags & ~7)
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
        sparse = _read_coverage(reader, keys + (tail > 0)) if flags & OfferFlag.SPARSE else ()
        reader.finish()
        path = NodePath(root, block, _digests(key_bytes), tail_key, tail_ids, sparse)
        if list(resume_tokens) != sorted(set(resume_tokens)) or any(path.node_at(n) is None for n in resume_tokens):
            raise ProtocolError("OFFER names resume points that are not ascending ends of its prefix nodes")
        grid_digests = _digests(grid_bytes)
        return cls(path, salt, resume_tokens, grid_digests, rows, total, deadline_ms, priority, OfferFlag(flags))


def _read_coverage(reader: Reader, nodes: int) -> tuple[SparseNode, ...]:
    count, mask_bytes = reader.fixed(_COVERAGE)
    _check_count("sparse nodes", count, 1, nodes)
    _check_count("bytes of a coverage", mask_bytes, 1, LAYERS_MAX * (BLOCK_TOKENS_MAX // 8))
    sparse = []
    for _ in range(count):
        node, whole_key = reader.fixed(_SPARSE_NODE)
        sparse.append(SparseNode(node, whole_key, reader.bytes(mask_bytes)))
    return tuple(sparse)


def offer_rows(arrays: RecordArrays) -> tuple[Rows, tuple[bytes, ...]]:
    """The rows and grids that describe records."""
    if len(arrays.digests) > GRIDS_MAX:
        raise TransferError(f"the records come from {len(arrays.digests)} chunk grids, the limit is {GRIDS_MAX}")
    rows = np.zeros(len(arrays), OFFER_RECORD)
    for column, field in enumerate(NAME_FIELDS):
        rows[field] = arrays.names.table[:, column]
    rows["grid"] = arrays.digest_numbers
    rows["codec"] = CODEC_RAW
    rows["coverage"] = arrays.by_layout(
        COVERAGE_TOKENS if layout.is_sparse else COVERAGE_ALL for layout in arrays.layouts
    )
    rows["pieces"] = arrays.by_layout(len(layout.pieces) for layout in arrays.layouts)
    rows["valid_tokens"] = arrays.valid_tokens
    rows["size_bytes"] = arrays.by_layout(pieces_bytes(layout) for layout in arrays.layouts)
    return rows, tuple(arrays.digests)


def check_offer(offer: Offer, spec: ModelSpec) -> RecordArrays:
    """The offered records as this side's spec understands them; what they cost is not known yet.

    Raises:
        ProtocolError: a record that the spec does not have, or described otherwise than the spec does.
    """
    path = offer.path
    if path.block_tokens != spec.block_tokens:
        raise ProtocolError(f"OFFER has {path.block_tokens} tokens per block, the spec {spec.block_tokens}")
    rows = offer.records
    columns = [rows[field].astype(np.int64) for field in NAME_FIELDS]
    node, group, span = columns[:3]
    _refuse((node >= len(path)) | (group >= len(spec.groups)), "names a node or a group that does not exist")
    spans = np.array([len(spec.spans[number]) for number in range(len(spec.groups))], np.int64)
    _refuse(span >= spans[group], "names a span that does not exist")
    grids = rows["grid"].astype(np.int64)
    _refuse(grids >= len(offer.grids), f"names a chunk grid of which there are {len(offer.grids)}")
    wrong = wrong_sparse(spec, path, path.sparse)
    if wrong is not None:
        raise ProtocolError(f"OFFER {wrong}")
    _refuse(rows["codec"] != CODEC_RAW, "has another codec than 0; version 1 moves raw records")
    is_sparse = np.isin(node, list(path.masks)) & np.isin(group, spec.attention_groups)
    _refuse(
        rows["coverage"] != np.where(is_sparse, COVERAGE_TOKENS, COVERAGE_ALL),
        "has another coverage than the offer's coverage table says; that of states is 0",
    )
    units = np.array([spec.groups[number].unit_count for number in range(len(spec.groups))], np.int64)
    _refuse((columns[3] >= columns[4]) | (columns[4] > units[group]), "names shard units that its group does not have")
    names = RecordNames(np.stack(columns, axis=1).astype(np.uint64))
    classes, numbers = names.classes
    for each in classes:
        _check_class(spec, each)
    _, first = np.unique(node * len(classes) + numbers, return_index=True)
    is_repeated = np.ones(len(rows), np.bool_)
    is_repeated[first] = False
    _refuse(is_repeated, "is named twice")
    layouts, numbers = layouts_of(spec, path, names)
    pieces = np.array([len(layout.pieces) for layout in layouts], np.int64)[numbers]
    sizes = np.array([pieces_bytes(layout) for layout in layouts], np.int64)[numbers]
    is_other = (rows["pieces"] != pieces) | (rows["size_bytes"] != sizes.astype(np.uint64))
    _refuse(is_other, "has pieces of which the spec says another number or size")
    ends = (node + 1) * path.block_tokens
    ends[node >= len(path.keys)] = path.tokens
    valid = valid_tokens(spec, group, ends)
    _refuse(rows["valid_tokens"] != valid, "holds more or fewer tokens than the spec says")
    is_stray = np.isin(group, spec.state_groups) & ~np.isin(ends, offer.resume_tokens)
    _refuse(is_stray, "is a state at no resume point of the offer")
    total_bytes = int(sizes.sum())
    if total_bytes != offer.total_bytes:
        raise ProtocolError(f"OFFER claims {offer.total_bytes} bytes, its records add up to {total_bytes}")
    costs_us = np.zeros(len(rows), np.uint64)
    return RecordArrays(names, layouts, numbers, ends, valid, list(offer.grids), grids, costs_us)


def _refuse(is_wrong: npt.NDArray[np.bool_], how: str) -> None:
    """Raises `ProtocolError` for the first record that is wrong."""
    wrong = np.flatnonzero(is_wrong)
    if wrong.size:
        raise ProtocolError(f"record {wrong[0]} of the offer {how}")


def _check_class(spec: ModelSpec, each: tuple[int, int, int, int]) -> None:
    """Raises `ProtocolError` for units that hold nothing."""
    group, span, start, stop = each
    try:
        record_layout(spec, group, span, UnitRange(start, stop))
    except SpecError as error:
        raise ProtocolError(f"the offer names units {start} to {stop} of group {group}: {error}") from error


def _digests(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES))


def _check_count(what: str, count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise ProtocolError(f"OFFER has {count} {what}; allowed are {least} to {most}")
