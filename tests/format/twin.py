"""The readable JSON twin of a golden record, and the record that today's writer makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.record import Record, RecordHeader, record_layout, write_record_stream
from kvstore.spec import ModelSpec, UnitRange
from tests.format.float_bits import storage_of

VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.json"))


def load_twin(name: str) -> dict[str, Any]:
    twin: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return twin


def load_golden(name: str) -> bytes:
    return (VECTORS / f"{name}.arrow").read_bytes()


def spec_of(twin: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_json(json.dumps(twin["spec"]))


def record_of(twin: dict[str, Any]) -> Record:
    """Fill and seal a record with the twin's tensors. What it says of the framing is not looked at."""
    spec = spec_of(twin)
    group = next(index for index, group in enumerate(spec.groups) if group.name == twin["record"]["group"])
    units = UnitRange(*twin["record"]["units"])
    layout = record_layout(spec, group, twin["record"]["span"], units, "held" in twin)
    record = Record(layout, memoryview(bytearray(layout.record_bytes)))
    for tensor in twin["tensors"]:
        index = next(i for i, known in enumerate(layout.group.tensors) if known.name == tensor["name"])
        stored = storage_of(tensor["values"], tensor["dtype"])
        pieces = layout.tensor_pieces(tensor["layer"], index)
        whole = np.zeros((stored.shape[0], layout.capacity_tokens, *stored.shape[2:]), stored.dtype)
        if layout.capacity_tokens:
            whole[:, : stored.shape[1]] = stored
        data = (whole if layout.capacity_tokens else stored).tobytes()
        assert len(data) == sum(layout.pieces[piece].size_bytes for piece in pieces)
        for piece in pieces:
            size_bytes = layout.pieces[piece].size_bytes
            record.piece(piece)[:] = data[:size_bytes]
            data = data[size_bytes:]
    if "held" in twin:
        record.coverage[:] = coverage_of(twin)
    record.checksums[:] = record.compute_checksums()
    record.seal(header_of(twin))
    return record


def coverage_of(twin: dict[str, Any]) -> bytes:
    """The coverage column: a byte per layer, since a block has four tokens."""
    return bytes(sum(is_held << token for token, is_held in enumerate(held)) for held in twin["held"])


def header_of(twin: dict[str, Any]) -> RecordHeader:
    header = twin["header"]
    return RecordHeader(
        key=bytes.fromhex(header["key"]),
        parent=bytes.fromhex(header["parent"]),
        grid=bytes.fromhex(header["grid"]),
        end_tokens=header["end_tokens"],
        valid_tokens=header["valid_tokens"],
        cost_us=header["cost_us"],
    )


def stream_of(twin: dict[str, Any]) -> bytes:
    return write_record_stream(record_of(twin))
