"""Records as standalone streams, with bytes damaged, foreign, or made up to deceive."""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore._native import crc32c
from kvstore.errors import FormatVersionError, RecordError
from kvstore.limits import RECORD_BYTES_MAX, RECORD_HEADER_BYTES_MAX
from kvstore.record import (
    Record,
    read_record_stream,
    write_record_stream,
)
from kvstore.record.header import CHECKSUM_FIELD, CHECKSUM_ZERO
from kvstore.record.stream import STREAM_BYTES_MAX
from tests.format.records import HEADER, RECORDS, attention_record, fields_of

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("make", RECORDS)
def test_every_flipped_byte_of_a_stream_is_noticed(make: Callable[[], Record]) -> None:
    intact = write_record_stream(make())
    damaged = bytearray(intact)
    for at in range(len(intact)):
        damaged[at] ^= 1 << at % 8
        with pytest.raises(RecordError):
            read_record_stream(damaged)
        damaged[at] = intact[at]
    assert read_record_stream(damaged)


def test_damaged_metadata_never_reaches_arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of Arrow crash on it."""
    record = attention_record()
    stream = bytearray(write_record_stream(record))
    monkeypatch.setattr("pyarrow.ipc.read_schema", lambda *_: pytest.fail("Arrow was given damaged metadata"))
    for at in range(len(record.layout.schema_message) + record.layout.header_bytes):
        stream[at] ^= 0x10
        with pytest.raises(RecordError):
            read_record_stream(stream)
        stream[at] ^= 0x10
    with pytest.raises(pytest.fail.Exception, match="was given"):
        read_record_stream(stream)


@pytest.mark.parametrize("make", RECORDS)
def test_a_truncated_stream_is_refused_at_every_length(make: Callable[[], Record]) -> None:
    intact = write_record_stream(make())
    for length in range(len(intact)):
        with pytest.raises(RecordError):
            read_record_stream(intact[:length])


def test_oversized_and_continued_streams_are_refused() -> None:
    intact = write_record_stream(attention_record())
    for tail in (b"\0", b"\0" * 8, intact, b"\xff\xff\xff\xff\0\0\0\0"):
        with pytest.raises(RecordError, match="bytes follow the record"):
            read_record_stream(intact + tail)
    with pytest.raises(RecordError, match="more than any record"):
        read_record_stream(bytes(STREAM_BYTES_MAX + 1))


def test_a_message_may_not_claim_more_than_the_limits() -> None:
    stream = bytearray(write_record_stream(attention_record()))
    struct.pack_into("<i", stream, 4, RECORD_HEADER_BYTES_MAX + 8)
    with pytest.raises(RecordError, match="claims"):
        read_record_stream(stream)
    for body_bytes in (RECORD_BYTES_MAX + 8, -8, 1 << 62):
        record = attention_record()
        stream = bytearray(write_record_stream(record))
        body = struct.pack("<q", record.layout.body_bytes)
        framing = slice(len(record.layout.schema_message), len(record.layout.schema_message) + 1024)
        assert stream[framing].count(body) == 1
        at = stream.index(body, framing.start)
        struct.pack_into("<q", stream, at, body_bytes)
        with pytest.raises(RecordError, match=r"claims|truncated"):
            read_record_stream(stream)


# Foreign


def rewritten(
    record: Record, change: Callable[[dict[bytes, bytes]], object], custom: dict[str, bytes] | None = None
) -> bytes:
    """The record's stream with another schema metadata, its metadata checksum made to hold again."""
    batch = record.to_arrow()
    metadata = dict(batch.schema.metadata)
    change(metadata)
    return resealed(batch.replace_schema_metadata(metadata), record, custom)


def resealed(batch: pa.RecordBatch, record: Record, custom: dict[str, bytes] | None = None) -> bytes:
    """A stream with the header padded and the checksum computed as the format says."""
    fields = {**fields_of(record.header()), CHECKSUM_FIELD: CHECKSUM_ZERO, **(custom or {})}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata=fields)
    stream = sink.getvalue().to_pybytes()
    schema_bytes = 8 + struct.unpack_from("<i", stream, 4)[0]
    schema, message = stream[:schema_bytes], stream[schema_bytes:-8]
    metadata_bytes = 8 + struct.unpack_from("<i", message, 4)[0]
    header = bytearray(message[:metadata_bytes].ljust(-(-metadata_bytes // 4096) * 4096, b"\0"))
    struct.pack_into("<i", header, 4, len(header) - 8)
    checksums = record.checksums.tobytes()
    stored = b"crc32c:%08x" % crc32c(checksums, crc32c(header, crc32c(schema)))
    at = header.find(CHECKSUM_ZERO)
    if at >= 0:
        header[at : at + len(stored)] = stored
    return b"".join((schema, header, message[metadata_bytes:], stream[-8:]))


def test_resealing_makes_a_record_that_opens() -> None:
    """Or else the tests below could not tell what was refused."""
    record = attention_record()
    assert rewritten(record, lambda metadata: metadata) == write_record_stream(record)
    unknown = read_record_stream(rewritten(record, lambda metadata: metadata.update({b"kvstore.future": b"1"})))
    assert unknown.header == HEADER, "unknown metadata is ignored"
    assert (
        read_record_stream(rewritten(record, lambda metadata: metadata.update({b"\xff\xfe": b"\xff"}))).header == HEADER
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", b"2"), ("version", b"1.0"), ("codecs", b"int8"), ("codecs", b"raw,lz4"), ("coverage", b"0-3")],
)
def test_another_version_codec_or_coverage_is_refused(field: str, value: bytes) -> None:
    stream = rewritten(attention_record(), lambda metadata: metadata.update({f"kvstore.{field}".encode(): value}))
    with pytest.raises(FormatVersionError, match="know"):
        read_record_stream(stream)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", None),
        ("fingerprint", b"00"),
        ("fingerprint", b"0" * 63 + b"A"),
        ("fingerprint", b"0" * 62 + b" 0"),
        ("model", None),
        ("group", None),
        ("rule", b"never"),
        ("rule", b"state"),
        ("layers", b""),
        ("layers", b"1,1"),
        ("layers", b"3,1"),
        ("layers", b"1"),
        ("layers", b"1,3,5"),
        ("layers", b"-1,3"),
        ("layers", b"1,99999999"),
        ("layers", b"1_0,30"),
        ("layers", b"\xd9\xa1,\xd9\xa3"),  # Arabic digits, which int() would take
        ("span", b"x"),
        ("units", b"0:2"),
        ("units", b"0:0:2"),
        ("units", b"0:3:2"),
        ("units", b"1:2:2"),
        ("units", b"0:3:3"),
        ("block_tokens", b"0"),
        ("block_tokens", b"8"),
        ("block_tokens", b"9" * 5000),
        ("capacity_tokens", b"8"),
        ("capacity_tokens", b"0"),
        ("codecs", None),
        ("coverage", None),
    ],
)
def test_metadata_that_is_missing_or_contradicts_the_columns_is_refused(field: str, value: bytes | None) -> None:
    name = f"kvstore.{field}".encode()

    def change(metadata: dict[bytes, bytes]) -> None:
        if value is None:
            del metadata[name]
        else:
            metadata[name] = value

    # "rule" alone decides how many tokens a state holds: 7 tokens fill a window of 4, so 3 is wrong there.
    with pytest.raises(RecordError):
        read_record_stream(rewritten(attention_record(), change))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", b"z" * 64),
        ("key", b"A" * 64),
        ("key", b"\xff" * 64),
        ("parent", b"0" * 63),
        ("grid", b""),
        ("end_tokens", b"00000000000 "),
        ("end_tokens", b"-00000000007"),
        ("end_tokens", b"000000000008"),
        ("end_tokens", b"999999999999"),
        ("valid_tokens", b"00000004"),
        ("valid_tokens", b"7"),
        ("cost_us", b"0x00000000000001"),
        ("metadata_crc32c", b"crc32c:00000001"),
        ("metadata_crc32c", b"md5:45678901234"),
        ("metadata_crc32c", b"crc32c:0"),
    ],
)
def test_per_record_fields_that_are_malformed_are_refused(field: str, value: bytes) -> None:
    with pytest.raises(RecordError):
        read_record_stream(rewritten(attention_record(), lambda metadata: None, {f"kvstore.{field}": value}))


def columns_of(record: Record) -> dict[str, tuple[pa.Field, pa.Array]]:
    batch = record.to_arrow()
    return {field.name: (field, array) for field, array in zip(batch.schema, batch.columns, strict=True)}


def with_column(name: str, field: pa.Field, array: pa.Array) -> bytes:
    record = attention_record()
    columns = {**columns_of(record), name: (field, array)}
    schema = pa.schema([field for field, _ in columns.values()], record.layout.schema.metadata)
    return resealed(pa.record_batch([array for _, array in columns.values()], schema=schema), record)


def keys_field(**metadata: str) -> tuple[pa.Field, pa.Array]:
    field, array = columns_of(attention_record())["keys"]
    known = {key.decode(): value.decode() for key, value in field.metadata.items()}
    return field.with_metadata({**known, **{f"kvstore.{name}": value for name, value in metadata.items()}}), array


@pytest.mark.parametrize(
    "metadata",
    [
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "complex64"},
        {"segments": ""},
        {"segments": "heads"},
        {"segments": "heads:0:2:2"},
        {"segments": "heads:0:2:2:2"},
        {"segments": "heads:0:1:1:1"},
        {"segments": "heads:0:1:2:1"},
        {"segments": "heads:1:2:2:1,heads:0:1:2:1"},
        {"segments": "heads:0:2:2:0"},
        {"segments": "heads:0:2:0:1"},
        {"segments": "heads:0:2:3:1"},
        {"segments": "he ads:0:2:2:1"},
        {"segments": "heads:0:2:2:1,heads:0:2:2:1"},
        {"segments": "heads:0:999999999:999999999:1"},
    ],
)
def test_a_column_that_contradicts_its_metadata_is_refused(metadata: dict[str, str]) -> None:
    field, array = keys_field(**metadata)
    with pytest.raises(RecordError):
        read_record_stream(with_column("keys", field, array))
    unchanged, array = keys_field()
    assert read_record_stream(with_column("keys", unchanged, array)).header == HEADER


def tensor_array(type_: pa.FixedShapeTensorType, rows: int, mask: bool = False) -> pa.Array:
    size = type_.storage_type.list_size
    values = pa.array([None if mask and i == 0 else 1 for i in range(rows * size)], type_.value_type)
    return pa.ExtensionArray.from_storage(type_, pa.FixedSizeListArray.from_arrays(values, size))


@pytest.mark.parametrize(
    ("shape", "names", "permutation"),
    [
        ([2, 4, 3], ["rows", "tokens", "dim0"], None),
        ([2, 4, 3], ["rows", "tokens", "dim0"], [0, 1, 2]),
        ([2, 4, 3], ["rows", "tokens", "dim0"], [2, 1, 0]),
        ([4, 2, 3], ["rows", "tokens", "dim0"], [1, 0, 2]),
        ([24], ["rows"], None),
        ([1, 4, 6], ["rows", "tokens", "dim0"], [1, 0, 2]),
    ],
)
def test_a_column_of_another_shape_is_refused(
    shape: list[int], names: list[str], permutation: list[int] | None
) -> None:
    field, _ = keys_field()
    type_ = pa.fixed_shape_tensor(pa.float32(), shape, names, permutation)
    with pytest.raises(RecordError):
        read_record_stream(with_column("keys", field.with_type(type_), tensor_array(type_, 2)))


def test_columns_that_are_not_a_records_are_refused() -> None:
    field, array = keys_field()
    type_ = field.type
    cases = [
        ("keys", field.with_nullable(True), array),
        ("keys", pa.field("keys", pa.int32(), nullable=False, metadata=field.metadata), pa.array([1, 2], pa.int32())),
        ("keys", pa.field("values", type_, nullable=False, metadata=field.metadata), array),
        ("keys", pa.field("keys", pa.string(), nullable=False), pa.array(["a", "b"])),
        (
            "keys",
            pa.field("keys", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.array(["a", "b"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        ),
        ("extra", pa.field("extra", pa.int32(), nullable=False), pa.array([1, 2], pa.int32())),
        ("crc32c", pa.field("crc32c", pa.uint32(), nullable=False), pa.array([1, 2], pa.uint32())),
        (
            "crc32c",
            pa.field("checksums", columns_of(attention_record())["crc32c"][0].type, nullable=False),
            columns_of(attention_record())["crc32c"][1],
        ),
    ]
    for name, case_field, case_array in cases:
        with pytest.raises(RecordError):
            read_record_stream(with_column(name, case_field, case_array))


def test_nulls_are_refused() -> None:
    field, _ = keys_field()
    masked = tensor_array(field.type, 2, mask=True)
    with pytest.raises(RecordError):
        read_record_stream(with_column("keys", field, masked))


def test_a_compressed_body_is_refused_before_it_is_inflated() -> None:
    record = attention_record()
    batch = record.to_arrow()
    for codec in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_batch(batch, custom_metadata=fields_of(record.header()))
        with pytest.raises(RecordError, match="compressed"):
            read_record_stream(sink.getvalue().to_pybytes())


def test_foreign_arrow_is_refused() -> None:
    table = pa.table({"a": [1, 2, 3]})
    stream, file = pa.BufferOutputStream(), pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(RecordError, match=r"no kvstore\.version"):
        read_record_stream(stream.getvalue().to_pybytes())
    with pytest.raises(RecordError, match="not a record"):
        read_record_stream(file.getvalue().to_pybytes())
    for data in (b"", b"\0" * 4096, b"\xff" * 4096, b"\xff\xff\xff\xff\x10\0\0\0" + bytes(4096)):
        with pytest.raises(RecordError):
            read_record_stream(data)


# Fuzzing


@cache
def samples() -> tuple[bytes, ...]:
    return tuple(write_record_stream(make()) for make in RECORDS)


fuzzing = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(st.binary(max_size=8192))
@fuzzing
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        read_record_stream(data)


@given(st.data())
@fuzzing
def test_mutations_are_refused(data: st.DataObject) -> None:
    """Several bytes of the metadata at once, or a piece cut out, doubled or moved."""
    intact = data.draw(st.sampled_from(samples()))
    stream = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(stream) - 1))
        size = data.draw(st.integers(1, 16))
        match data.draw(st.sampled_from(["put", "cut", "double", "move"])):
            case "put":
                stream[at : at + size] = data.draw(st.binary(min_size=1, max_size=16))
            case "cut":
                del stream[at : at + size]
            case "double":
                stream[at:at] = stream[at : at + size]
            case "move":
                moved = stream[at : at + size]
                del stream[at : at + size]
                target = data.draw(st.integers(0, len(stream)))
                stream[target:target] = moved
    if bytes(stream) == intact:
        assert read_record_stream(stream)
    else:
        with pytest.raises(RecordError):
            read_record_stream(stream)


@given(st.data())
@fuzzing
def test_mutations_behind_a_checksum_that_holds_do_not_crash(data: st.DataObject) -> None:
    """Someone who can compute checksums still gets an error or a record, nothing else."""
    intact = data.draw(st.sampled_from(samples()))
    stream = bytearray(intact)
    schema_bytes = 8 + struct.unpack_from("<i", stream, 4)[0]
    header_bytes = 8 + struct.unpack_from("<i", stream, schema_bytes + 4)[0]
    used = len(bytes(stream[schema_bytes : schema_bytes + header_bytes]).rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, schema_bytes + used - 1))
        stream[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 8, 127, 128, 255])))
    checksum_column = read_record_stream(intact).batch.column("crc32c").flatten().to_numpy().tobytes()
    header = stream[schema_bytes : schema_bytes + header_bytes]
    at = header.find(b"crc32c:")
    if at < 0 or len(header) < at + 15:
        return
    header[at : at + 15] = CHECKSUM_ZERO
    stored = b"crc32c:%08x" % crc32c(checksum_column, crc32c(header, crc32c(stream[:schema_bytes])))
    stream[schema_bytes + at : schema_bytes + at + 15] = stored
    try:
        found = read_record_stream(stream)
    except RecordError:
        return
    for layer in found.fields.layers:
        for column in found.columns:
            assert found.tensor(layer, column.name).shape == column.shape
