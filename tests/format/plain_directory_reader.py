"""A second reader of directories, from docs/format.md alone: pyarrow, NumPy and nothing of kvstore.

It reads one directory whose journal was closed in order; which of several journals counts is not repeated here.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tests.format.plain_reader import crc32c
from tests.format.plain_reader import read as read_record

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from tests.format.plain_reader import PlainRecord

PAGE = 4096
TABLES = {
    "segments": np.dtype([("number", "<u8"), ("nonce", "<u8"), ("name", "<u2", 4)]),
    "roots": np.dtype([("key", "V32"), ("salt_bytes", "<u4"), ("zero", "<u4")]),
    "salts": np.dtype("u1"),
    "nodes": np.dtype(
        [("key", "V32"), ("parent", "V32"), ("end_tokens", "<u4"), ("root", "<u4"), ("tail_tokens", "<u4"),
         ("zero", "<u4")]
    ),
    "tail_ids": np.dtype("<u4"),
    "records": np.dtype(
        [("node", "<u4"), ("grid", "<u4"), ("segment", "<u4"), ("metadata_crc32c", "<u4"), ("offset", "<u8"),
         ("cost_us", "<u8"), ("slot_bytes", "<u4"), ("zero", "<u4")]
    ),
    "grids": np.dtype("V32"),
    "forgotten": np.dtype([("key", "V32"), ("is_state", "<u4"), ("zero", "<u4")]),
}  # fmt: skip
"""In the order of a frame, each padded to 8 bytes."""


@dataclass
class PlainFrame:
    """One frame of a journal.

    Attributes:
        offset, sequence, kind, next_segment: of its head.
        tables: rows by the names of `TABLES`.
    """

    offset: int
    sequence: int
    kind: int
    next_segment: int
    tables: dict[str, npt.NDArray[Any]]


@dataclass
class PlainEntry:
    """One record that the journal names.

    Attributes:
        key, parent, end_tokens, tail_ids, salt, grid, cost_us: of its rows.
        name: group, span, first unit, unit after the last.
        is_forgotten: a later frame dropped it.
        record: what its bytes say; its checksums hold.
    """

    key: bytes
    parent: bytes
    end_tokens: int
    tail_ids: list[int]
    salt: bytes
    grid: bytes
    cost_us: int
    name: tuple[int, int, int, int]
    is_forgotten: bool
    record: PlainRecord


def read_manifest(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Directory id and model spec; both copies are equal."""
    half = len(data) // 2
    assert data[:half] == data[half:]
    magic, version, checksum, directory_id, _, size_bytes, json_checksum = struct.unpack_from("<8sII16s32sII", data)
    assert (magic, version) == (b"KVSMNFT1", 1)
    assert checksum == crc32c(data[:12] + bytes(4) + data[16:96])
    text = data[96 : 96 + size_bytes]
    assert json_checksum == crc32c(text)
    return directory_id, json.loads(text)


def read_journal(data: bytes, number: int, nonce: int, directory_id: bytes) -> list[PlainFrame]:
    """All frames, every one of which is sound."""
    frames: list[PlainFrame] = []
    at = 0
    while at < len(data):
        head = struct.unpack_from("<8sII16sQQQQIIQ8I", data, at)
        (
            magic,
            checksum,
            tables_checksum,
            owner,
            journal,
            own_nonce,
            sequence,
            offset,
            kind,
            size_bytes,
            next_,
            *counts,
        ) = head
        assert magic == b"KVSJRNL1"
        assert checksum == crc32c(data[at : at + 8] + bytes(4) + data[at + 12 : at + 128])
        assert tables_checksum == crc32c(data[at + 128 : at + 128 + size_bytes])
        assert (owner, journal, own_nonce, offset) == (directory_id, number, nonce, at)
        assert not frames or sequence > frames[-1].sequence
        tables = {}
        begin = at + 128
        for (name, row), count in zip(TABLES.items(), counts, strict=True):
            tables[name] = np.frombuffer(data, row, count, begin)
            begin += -(-count * row.itemsize // 8) * 8
        assert begin == at + 128 + size_bytes
        frames.append(PlainFrame(at, sequence, kind, next_, tables))
        end = -(-begin // PAGE) * PAGE
        assert not any(data[begin:end])
        at = end
    return frames


def read_segment(
    path: Path, number: int, nonce: int, directory_id: bytes, name: tuple[int, ...]
) -> tuple[bytes, bytes]:
    """The schema message as it stands in a stream, and the file; Arrow opens it, and its stamps are sound."""
    data = path.read_bytes()
    head_bytes = 16 + struct.unpack_from("<i", data, 12)[0]
    assert head_bytes % PAGE == 0
    stamp = data[head_bytes - 64 : head_bytes]
    assert stamp[:60] == b"KVSSEGM1" + struct.pack("<16sQQ4H12x", directory_id, number, nonce, *name)
    assert struct.unpack("<I", stamp[60:])[0] == crc32c(stamp[:60] + bytes(4))
    with pa.ipc.open_file(path) as reader:
        schema = reader.schema.serialize().to_pybytes()
        count = reader.num_record_batches
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - 10)
    footer = data[len(data) - 10 - footer_bytes : len(data) - 10]
    ends = [at for at in range(head_bytes, len(data), PAGE) if data[at + 8 : at + 16] == b"KVSSEAL1"]
    (end,) = ends
    seal = data[end + 8 : end + 72]
    assert seal[8:40] == struct.pack("<16sQQ", directory_id, number, nonce)
    assert struct.unpack_from("<QI", seal, 40) == (end, crc32c(footer))
    assert count > 0
    return schema, data


def read_directory(directory: Path) -> tuple[dict[str, Any], list[PlainFrame], list[PlainEntry]]:
    """Model spec, frames, and the records that they name."""
    directory_id, spec = read_manifest((directory / "manifest").read_bytes())
    (path,) = directory.glob("journal-*.kvj")
    number, nonce = path.stem.split("-")[1:]
    frames = read_journal(path.read_bytes(), int(number), int(nonce, 16), directory_id)
    dropped = {
        (bytes(row["key"]), bool(row["is_state"])): frame.sequence
        for frame in frames
        for row in frame.tables["forgotten"]
    }
    entries = []
    for frame in frames:
        tables = frame.tables
        segments = []
        for row in tables["segments"]:
            own, name = (int(row["number"]), int(row["nonce"])), tuple(row["name"].tolist())
            file = directory / f"segment-{own[0]:010}-{own[1]:016x}.arrow"
            segments.append((name, *read_segment(file, *own, directory_id, name)))
        tail_ends = np.cumsum(tables["nodes"]["tail_tokens"].astype(int))
        salt_ends = np.cumsum(tables["roots"]["salt_bytes"].astype(int))
        for row in tables["records"]:
            node = tables["nodes"][row["node"]]
            name, schema, data = segments[int(row["segment"])]
            offset = int(row["offset"])
            assert offset % PAGE == 0
            header_bytes = 8 + struct.unpack_from("<i", data, offset + 4)[0]
            (body_bytes,) = struct.unpack_from("<q", data, offset + 48)
            assert header_bytes + body_bytes <= int(row["slot_bytes"])
            stream = schema + data[offset : offset + header_bytes + body_bytes] + b"\xff\xff\xff\xff\0\0\0\0"
            record = read_record(stream)
            assert record.header["kvstore.metadata_crc32c"] == f"crc32c:{int(row['metadata_crc32c']):08x}"
            tail_end, salt_end = tail_ends[row["node"]], salt_ends[node["root"]]
            is_state = spec["groups"][name[0]]["rule"] == "state"
            entries.append(
                PlainEntry(
                    key=bytes(node["key"]),
                    parent=bytes(node["parent"]),
                    end_tokens=int(node["end_tokens"]),
                    tail_ids=tables["tail_ids"][tail_end - int(node["tail_tokens"]) : tail_end].tolist(),
                    salt=tables["salts"][
                        salt_end - int(tables["roots"]["salt_bytes"][node["root"]]) : salt_end
                    ].tobytes(),
                    grid=bytes(tables["grids"][row["grid"]]),
                    cost_us=int(row["cost_us"]),
                    name=name,
                    is_forgotten=dropped.get((bytes(node["key"]), is_state), 0) > frame.sequence,
                    record=record,
                )
            )
    return spec, frames, entries
