"""Small records of random bytes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from kvstore.record import Record, RecordHeader, record_layout
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from kvstore.record import RecordLayout
    from kvstore.spec import UnitRange

HEADER = RecordHeader(key=b"k" * 32, parent=b"p" * 32, end_tokens=7, valid_tokens=3, grid=b"g" * 32, cost_us=1234)
STATE_HEADER = RecordHeader(key=b"k" * 32, parent=b"p" * 32, end_tokens=7, valid_tokens=0, grid=b"g" * 32)


def fields_of(header: RecordHeader) -> dict[str, bytes]:
    """The fixed-width ASCII fields as docs/format.md has them, without the checksum."""
    return {
        "kvstore.key": header.key.hex().encode(),
        "kvstore.parent": header.parent.hex().encode(),
        "kvstore.grid": header.grid.hex().encode(),
        "kvstore.end_tokens": b"%012d" % header.end_tokens,
        "kvstore.valid_tokens": b"%08d" % header.valid_tokens,
        "kvstore.cost_us": b"%016d" % header.cost_us,
    }


def toy_spec(weights: str = "w", *, heads: int = 2, dtype: DType = DType.FLOAT32) -> ModelSpec:
    """Four tokens a block; keys and values of three dimensions, a state of two segments with odd sizes."""
    segments = (Segment("heads", heads, 1),)
    attention = CacheGroup(
        "attention",
        ReuseRule.ATTENTION,
        (1, 3),
        (
            TensorSpec("keys", dtype, segments, (3,), has_tokens=True),
            TensorSpec("values", dtype, segments, (3,), has_tokens=True),
        ),
    )
    state = CacheGroup(
        "state",
        ReuseRule.STATE,
        (0, 2),
        (
            TensorSpec(
                "conv",
                DType.INT8,
                (Segment("query", 2, 1), Segment("value", 4, 1), Segment("groups", 1, 1, replicated=True)),
                (3,),
                has_tokens=False,
            ),
        ),
    )
    return ModelSpec("toy", weights, 4, (attention, state))


def fill(layout: RecordLayout, header: RecordHeader, seed: int = 0) -> Record:
    """A sealed record of random bytes; a sparse one holds the first token of each layer."""
    memory = bytearray(random.Random(seed).randbytes(layout.slot_bytes))
    record = Record(layout, memoryview(memory))
    for piece in range(len(layout.pieces)):
        record.piece(piece)[:] = random.Random((seed, piece).__repr__()).randbytes(len(record.piece(piece)))
    record.coverage[:] = b"\1" * layout.coverage_bytes
    record.checksums[:] = record.compute_checksums()
    record.seal(header)
    return record


def attention_record(spec: ModelSpec | None = None, units: UnitRange | None = None) -> Record:
    spec = spec or toy_spec()
    return fill(record_layout(spec, 0, 0, units or spec.groups[0].all_units), HEADER)


def state_record(units: UnitRange | None = None) -> Record:
    spec = toy_spec()
    return fill(record_layout(spec, 1, 0, units or spec.groups[1].all_units), STATE_HEADER)


def sparse_record() -> Record:
    spec = toy_spec()
    return fill(record_layout(spec, 0, 0, spec.groups[0].all_units, is_sparse=True), HEADER)


RECORDS = [attention_record, state_record]
