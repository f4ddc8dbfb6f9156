"""Writes the golden files of format version 1. Run once, by hand: `python -m tests.format.make_vectors`.

Golden files are never regenerated: a change of the format gets a new version and new files beside these.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from kvstore.record import Record, read_record_stream
from kvstore.spec import CacheGroup, ChunkGrid, DType, ModelSpec, ReuseRule, Segment, TensorSpec, UnitRange
from tests.format.float_bits import float8_table
from tests.format.twin import VECTORS, record_of, stream_of

if TYPE_CHECKING:
    from pathlib import Path

LINE_CHARACTERS = 110
HEADS = (Segment("heads", 2, 1),)
EXACT: dict[str, list[float]] = {
    "float32": [0.0, -0.0, 1.0, -1.5, 0.10000000149011612, 3.4028234663852886e38, 1.401298464324817e-45, -7.25],
    "bfloat16": [0.0, -0.0, 1.0, -1.5, 0.10009765625, 3.3895313892515355e38, -0.0078125, 255.0],
    "float8_e4m3fn": [0.0, -0.0, 1.0, -1.5, 0.1015625, 448.0, 0.001953125, -240.0],
    "float8_e5m2": [0.0, -0.0, 1.0, -1.5, 0.09375, 57344.0, 1.52587890625e-05, -6.0],
}
"""Each with signed zeros, and the largest and smallest magnitude of most types."""


def token_tensor(name: str, dtype: DType, *inner: int, segments: tuple[Segment, ...] = HEADS) -> TensorSpec:
    return TensorSpec(name, dtype, segments, inner, has_tokens=True)


def state_tensor(name: str, dtype: DType, *inner: int, segments: tuple[Segment, ...]) -> TensorSpec:
    return TensorSpec(name, dtype, segments, inner, has_tokens=False)


ATTENTION = CacheGroup(
    "attention",
    ReuseRule.ATTENTION,
    (1, 3),
    (token_tensor("keys", DType.FLOAT32, 4), token_tensor("values", DType.FLOAT32, 2)),
)
WINDOW = CacheGroup(
    "window",
    ReuseRule.STATE,
    (0,),
    (token_tensor("keys", DType.BFLOAT16, 4), token_tensor("values", DType.BFLOAT16, 4)),
    window_tokens=5,
)
GATED_DELTA = CacheGroup(
    "gated_delta",
    ReuseRule.STATE,
    (0, 2),
    (
        state_tensor(
            "conv",
            DType.BFLOAT16,
            3,
            segments=(Segment("query", 2, 2), Segment("key", 2, 2), Segment("value", 4, 2)),
        ),
        state_tensor("recurrent", DType.FLOAT32, 2, 2, segments=(Segment("heads", 4, 1),)),
    ),
)
MAMBA2 = CacheGroup(
    "mamba2",
    ReuseRule.STATE,
    (0,),
    (
        state_tensor(
            "conv", DType.BFLOAT16, 3, segments=(Segment("heads", 4, 2), Segment("groups", 1, 2, replicated=True))
        ),
        state_tensor("recurrent", DType.FLOAT32, 2, 2, segments=(Segment("heads", 4, 1),)),
    ),
)
FLOAT8 = CacheGroup(
    "attention",
    ReuseRule.ATTENTION,
    (0,),
    (token_tensor("keys", DType.FLOAT8_E4M3FN, 4), token_tensor("values", DType.FLOAT8_E5M2, 4)),
)
BFLOAT16 = CacheGroup(
    "latent",
    ReuseRule.ATTENTION,
    (0, 1),
    (
        token_tensor("keys", DType.BFLOAT16, 5, segments=(Segment("latent", 1, 1, replicated=True),)),
        token_tensor("values", DType.BFLOAT16, 3, segments=(Segment("latent", 1, 1, replicated=True),)),
    ),
)

CASES: dict[str, tuple[str, CacheGroup, UnitRange, int]] = {
    "attention_full": ("a block of four tokens, keys wider than values, two layers", ATTENTION, UnitRange(0, 2), 8),
    "attention_partial": ("a tail: three of four tokens, the rest zero", ATTENTION, UnitRange(0, 2), 7),
    "attention_shard": ("the second of two tensor-parallel shards of a tail", ATTENTION, UnitRange(1, 2), 7),
    "attention_float8": ("float8 keys and values, carried as 8-bit integers", FLOAT8, UnitRange(0, 2), 4),
    "latent_bfloat16": ("a latent that replicates, bfloat16 carried as 16-bit integers", BFLOAT16, UnitRange(0, 1), 4),
    "window_full": ("a sliding window that is full", WINDOW, UnitRange(0, 2), 9),
    "window_partial": ("a sliding window at three tokens", WINDOW, UnitRange(0, 2), 3),
    "gated_delta": ("conv state of three segments, and recurrent state", GATED_DELTA, UnitRange(0, 4), 8),
    "gated_delta_shard": (
        "the second of four shards: a value and a head, no query, no key",
        GATED_DELTA,
        UnitRange(1, 2),
        8,
    ),
    "mamba2_shard_first": ("the first of two shards holds the replicated groups", MAMBA2, UnitRange(0, 2), 8),
    "mamba2_shard_second": ("the second does not", MAMBA2, UnitRange(2, 4), 8),
    "attention_sparse": ("a tail of which the layers hold two tokens and one of three", ATTENTION, UnitRange(0, 2), 7),
}
HELD: dict[str, dict[int, list[bool]]] = {
    "attention_sparse": {1: [True, False, True], 3: [False, True, False]},
}
"""Which tokens each layer holds, of records that do not hold all."""


def values(dtype: str, shape: tuple[int, ...], source: random.Random) -> Any:
    """Nested lists of numbers that are exact in `dtype`."""
    if not shape:
        if source.random() < 0.25:
            return source.choice(EXACT[dtype])
        if dtype.startswith("float8"):
            # Below 0x78 lie the positive numbers that are finite in both.
            return float(float8_table(4 if "e4m3" in dtype else 5)[source.randrange(0x78)])
        return source.randint(-128, 127) / 16
    return [values(dtype, shape[1:], source) for _ in range(shape[0])]


def make_twin(name: str) -> dict[str, Any]:
    title, group, units, end_tokens = CASES[name]
    source = random.Random(name)
    spec = ModelSpec("golden", f"weights of {name}", 4, (group,), (("rope", "none"),))
    valid_tokens = group.valid_tokens(spec.block_tokens, end_tokens)
    tensors = []
    for layer, tensor in itertools.product(group.layers, group.tensors):
        rows = sum(len(group.segment_units(segment, units)) * segment.unit_rows for segment in tensor.segments)
        shape = tensor.shape(rows, valid_tokens)
        label = tensor.dtype.label
        numbers = values(label, shape, source)
        if name in HELD:
            zeros = [[[0.0] * len(token) for token in row] for row in numbers]
            held = HELD[name][layer]
            numbers = [
                [token if is_held else zero for token, zero, is_held in zip(row, empty, held, strict=True)]
                for row, empty in zip(numbers, zeros, strict=True)
            ]
        tensors.append(
            {
                "layer": layer,
                "name": tensor.name,
                "dtype": label,
                "shape": list(shape),
                "values": numbers,
            }
        )
    twin = {
        "title": title,
        "format_version": 1,
        "spec": json.loads(spec.to_json()),
        "record": {"group": group.name, "span": 0, "units": [units.start, units.stop]},
        **({"held": [HELD[name][layer] for layer in group.layers]} if name in HELD else {}),
        "header": {
            "key": sha256(f"key of {name}".encode()).hexdigest(),
            "parent": sha256(f"parent of {name}".encode()).hexdigest(),
            "grid": ChunkGrid.every(4, upto=end_tokens).digest_at(end_tokens).hex(),
            "end_tokens": end_tokens,
            "valid_tokens": valid_tokens,
            "cost_us": source.randrange(10**6),
        },
        "tensors": tensors,
    }
    stream = read_record_stream(stream_of(twin))
    layout = record_of(twin).layout
    framing = {
        "schema_metadata": {key.decode(): value.decode() for key, value in stream.batch.schema.metadata.items()},
        "field_metadata": {
            field.name: {key.decode(): value.decode() for key, value in field.metadata.items()}
            for field in stream.batch.schema
            if field.metadata
        },
        "schema_bytes": stream.schema_bytes,
        "header_bytes": stream.header_bytes,
        "body_bytes": layout.body_bytes,
        "metadata_crc32c": stored_checksum(record_of(twin)),
        "pieces": [
            {
                "layer": piece.layer,
                "tensor": piece.tensor,
                "segment": piece.segment,
                "unit": piece.unit,
                "rows": piece.rows,
                "offset": piece.offset,
                "size_bytes": piece.size_bytes,
                "crc32c": f"{piece.checksum:08x}",
            }
            for piece in stream.pieces
        ],
    }
    return {**twin, "framing": framing}


def stored_checksum(record: Record) -> str:
    offset = record.layout.field_offsets["kvstore.metadata_crc32c"]
    return bytes(record.memory[offset : offset + 15]).decode()


def write(name: str, directory: Path) -> None:
    twin = make_twin(name)
    paths = (directory / f"{name}.arrow", directory / f"{name}.json")
    for path in paths:
        if path.exists():
            raise SystemExit(f"{path} exists; golden files are never written again")
    paths[0].write_bytes(stream_of(twin))
    paths[1].write_text(_readable(twin) + "\n")


def _readable(value: Any, indent: str = "") -> str:
    """JSON for people: what fits on a line stays on it."""
    flat = json.dumps(value, allow_nan=False)
    if len(indent) + len(flat) <= LINE_CHARACTERS or not isinstance(value, dict | list):
        return flat
    deeper = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_readable(item, deeper)}" for key, item in value.items()]
    else:
        parts = [_readable(item, deeper) for item in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return begin + "\n" + ",\n".join(deeper + part for part in parts) + "\n" + indent + end


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        write(case, VECTORS)
