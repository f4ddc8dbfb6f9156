"""The golden records: today's writer makes these bytes, and two readers agree on what they mean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.record import Record, read_record_stream
from kvstore.record.header import FIELD_WIDTHS
from kvstore.record.schema import ARROW_STORAGE
from tests.format import make_vectors, plain_reader
from tests.format.float_bits import storage_of, values_of
from tests.format.twin import (
    NAMES,
    VECTORS,
    coverage_of,
    header_of,
    load_golden,
    load_twin,
    record_of,
    spec_of,
    stream_of,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/format.md"
RECORDS_TEXT = DOCUMENT.read_text().partition("\n# Directory format\n")[0]


def numbers(array: Any) -> bytes:
    """Bits of the numbers: unlike `==` they tell -0.0 from 0.0."""
    return np.asarray(array, np.float64).tobytes()


def test_every_case_has_its_files() -> None:
    assert set(NAMES) >= set(make_vectors.CASES)
    assert sorted(path.stem for path in VECTORS.glob("*.arrow")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_writer_makes_the_golden_bytes(name: str) -> None:
    twin = load_twin(name)
    written, golden = stream_of(twin), load_golden(name)
    different = [at for at, (a, b) in enumerate(zip(written, golden, strict=False)) if a != b][:10]
    assert written == golden, f"{len(written)} bytes for {len(golden)}, different at {different}"


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_finds_what_the_twin_says(name: str) -> None:
    twin = load_twin(name)
    framing = twin["framing"]
    found = read_record_stream(load_golden(name))
    assert found.header == header_of(twin)
    assert found.fields.fingerprint == spec_of(twin).fingerprint
    assert found.fields.layers == tuple(spec_of(twin).groups[0].layers)
    assert (found.schema_bytes, found.header_bytes) == (framing["schema_bytes"], framing["header_bytes"])
    pieces = [
        (
            p["layer"],
            p["tensor"],
            p["segment"],
            p["unit"],
            p["rows"],
            p["offset"],
            p["size_bytes"],
            int(p["crc32c"], 16),
        )
        for p in framing["pieces"]
    ]
    assert [tuple(vars(piece).values()) for piece in found.pieces] == pieces
    assert found.coverage == (coverage_of(twin) if "held" in twin else None)
    for tensor in twin["tensors"]:
        stored = found.tensor(tensor["layer"], tensor["name"])
        valid = stored[:, : found.header.valid_tokens] if found.fields.capacity_tokens else stored
        assert numbers(values_of(valid, tensor["dtype"])) == numbers(tensor["values"])
        assert found.fields.capacity_tokens == 0 or not stored[:, found.header.valid_tokens :].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_slot_opens_what_the_stream_holds(name: str) -> None:
    twin = load_twin(name)
    layout = record_of(twin).layout
    golden = load_golden(name)
    assert golden[: twin["framing"]["schema_bytes"]] == layout.schema_message
    record = Record(layout, memoryview(golden)[twin["framing"]["schema_bytes"] :])
    assert record.verify() == header_of(twin)
    for tensor in twin["tensors"]:
        stored = record.tensor(tensor["layer"], tensor["name"])
        valid = stored[:, : twin["header"]["valid_tokens"]] if layout.capacity_tokens else stored
        assert valid.tobytes() == storage_of(tensor["values"], tensor["dtype"]).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_without_kvstore_agrees(name: str) -> None:
    twin = load_twin(name)
    record = plain_reader.read(load_golden(name))
    assert record.metadata == twin["framing"]["schema_metadata"]
    assert record.held == twin.get("held")
    assert record.header["kvstore.metadata_crc32c"] == twin["framing"]["metadata_crc32c"]
    assert [(piece[4], piece[5], f"{piece[6]:08x}") for piece in record.pieces] == [
        (piece["offset"], piece["size_bytes"], piece["crc32c"]) for piece in twin["framing"]["pieces"]
    ]
    for tensor in twin["tensors"]:
        values = record.tensors[tensor["layer"], tensor["name"]]
        assert numbers(values) == numbers(tensor["values"])
        logical = record.logical[tensor["layer"], tensor["name"]]
        if twin["framing"]["schema_metadata"]["kvstore.capacity_tokens"] != "0":
            logical = logical[: twin["header"]["valid_tokens"]].swapaxes(0, 1)
        assert logical.shape == values.shape
        assert numbers(logical) == numbers(values)


def test_golden_files_are_not_written_again() -> None:
    before = {path: path.stat().st_mtime_ns for path in VECTORS.iterdir()}
    with pytest.raises(SystemExit, match="never written again"):
        make_vectors.write(NAMES[0], VECTORS)
    assert {path: path.stat().st_mtime_ns for path in VECTORS.iterdir()} == before


@pytest.mark.parametrize(
    ("dtype", "bits", "value"),
    [
        ("bfloat16", 0x3F80, 1.0),
        ("bfloat16", 0xC040, -3.0),
        ("bfloat16", 0x7F7F, 3.3895313892515355e38),
        ("float8_e4m3fn", 0x7E, 448.0),
        ("float8_e4m3fn", 0x01, 2.0**-9),
        ("float8_e4m3fn", 0xB8, -1.0),
        ("float8_e5m2", 0x7B, 57344.0),
        ("float8_e5m2", 0x01, 2.0**-16),
        ("float8_e5m2", 0xBC, -1.0),
    ],
)
def test_bits_of_small_floats(dtype: str, bits: int, value: float) -> None:
    """Values from the definitions: arXiv 2209.05433 for float8."""
    stored = np.array([bits], np.uint16 if dtype == "bfloat16" else np.uint8)
    assert values_of(stored, dtype)[0] == value
    assert storage_of([value], dtype)[0] == bits


def run_example(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/04_read_record_with_pyarrow.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def test_the_example_shows_a_golden_record() -> None:
    output = run_example(str(VECTORS / "window_partial.arrow"))
    title = "layer 0, keys (bfloat16): [tokens 3, rows 2, dim0 4]"
    assert title in output
    printed = output.split(title)[1].split("layer")[0].replace("[", " ").replace("]", " ").split()
    keys = load_twin("window_partial")["tensors"][0]
    assert keys["name"] == "keys"
    expected = np.swapaxes(np.array(keys["values"], np.float32), 0, 1)
    assert np.array_equal(np.array(printed, np.float32), expected.ravel())


def test_the_example_writes_its_own_record() -> None:
    assert "layer 1, keys (bfloat16): [tokens 6, rows 2, dim0 4]" in run_example()


def test_the_document_shows_the_golden_bytes() -> None:
    golden = load_golden("attention_shard")
    lines = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", RECORDS_TEXT, re.MULTILINE)
    assert len(lines) >= 30
    for offset, data in lines:
        shown = bytes.fromhex(data)
        assert golden[int(offset, 16) : int(offset, 16) + len(shown)] == shown, offset


def test_the_document_names_every_key() -> None:
    text = DOCUMENT.read_text()
    framing = load_twin("attention_shard")["framing"]
    for key in (*framing["schema_metadata"], *framing["field_metadata"]["keys"]):
        assert f"| `{key}` |" in text
    for key, width in FIELD_WIDTHS.items():
        assert f"| `{key}` | {width} |" in text
    for label, type_ in ARROW_STORAGE.items():
        assert f"| `{label}` | {type_} |" in text
