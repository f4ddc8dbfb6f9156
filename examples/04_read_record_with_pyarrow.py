"""Read a stored record with plain pyarrow: `python examples/04_read_record_with_pyarrow.py [FILE]`.

Without FILE a record is first written by kvstore; the reading half needs nothing of kvstore.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa


def write_record(path: Path) -> None:
    """Store a prompt of six tokens and save one record of it as a file."""
    import kvstore
    from kvstore.record import write_record_stream
    from kvstore.spec import CacheGroup, DType, ReuseRule, Segment, TensorSpec

    keys = TensorSpec("keys", DType.BFLOAT16, (Segment("heads", 2, 1),), inner=(4,), has_tokens=True)
    spec = kvstore.ModelSpec(
        "example",
        weights="none",
        block_tokens=8,
        groups=(CacheGroup("attention", ReuseRule.ATTENTION, (0, 1), (keys,)),),
    )
    token_ids = [11, 12, 13, 14, 15, 16]
    computed = np.random.default_rng(0).random((2, 6, 4), np.float32)
    bfloat16 = (computed.view(np.uint32) >> 16).astype(np.uint16)  # [heads, tokens, dim]
    with kvstore.open(spec, dram="1MiB") as store:
        with store.write(token_ids) as writer:
            for layer in spec.layers:
                writer.put(layer, tokens=slice(0, 6), keys=bfloat16)
            writer.commit()
        match = store.match([*token_ids, 17])
        with store.read(match) as lease:
            path.write_bytes(write_record_stream(lease.record(lease.records[0])))


def to_float(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of stored elements; Arrow and NumPy have no bfloat16, which is the upper half of a float32."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored


def show_record(path: Path) -> None:
    """Print a record's metadata and tensors."""
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        batch, record = reader.read_next_batch_with_custom_metadata()
    metadata = {**batch.schema.metadata, **dict(record.items())}
    for name, value in metadata.items():
        print(f"{name.decode():24} {value.decode()}")
    layers = metadata[b"kvstore.layers"].decode().split(",")
    valid_tokens = int(metadata[b"kvstore.valid_tokens"])
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name == "crc32c":
            continue
        dtype = field.metadata[b"kvstore.dtype"].decode()
        # The permutation of the type makes this [layers, tokens, rows, *inner], whatever lies in memory.
        ordered = column.to_numpy_ndarray()
        permutation = field.type.permutation or range(len(field.type.shape))
        names = [field.type.dim_names[axis] for axis in permutation]
        for layer, tensor in zip(layers, ordered, strict=True):
            valid = tensor[:valid_tokens] if names[0] == "tokens" else tensor
            axes = ", ".join(f"{name} {size}" for name, size in zip(names, valid.shape, strict=True))
            print(f"\nlayer {layer}, {field.name} ({dtype}): [{axes}]")
            print(to_float(valid, dtype))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        show_record(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "record.arrow"
            write_record(file)
            show_record(file)
