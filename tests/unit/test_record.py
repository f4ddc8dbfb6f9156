"""Records in memory: sealing, views, and what damage and other classes do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from kvstore.errors import ChecksumError, RecordError, SpecError
from kvstore.record import (
    Record,
    RecordHeader,
    read_record_stream,
    record_layout,
    which_intact,
    write_record_stream,
)
from kvstore.record.array_view import address_of
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec, UnitRange
from tests.format.records import HEADER, RECORDS, STATE_HEADER, attention_record, fill, state_record, toy_spec

if TYPE_CHECKING:
    from collections.abc import Callable

# Sealing and opening


@pytest.mark.parametrize("make", RECORDS)
def test_a_sealed_record_opens_in_a_slot_and_as_a_stream(make: Callable[[], Record]) -> None:
    record = make()
    header = record.header()
    assert header == record.verify() == (HEADER if make is attention_record else STATE_HEADER)
    stream = read_record_stream(write_record_stream(record))
    assert stream.header == header
    assert stream.fields.fingerprint == record.layout.spec.fingerprint
    assert [(p.layer, p.offset, p.size_bytes) for p in stream.pieces] == [
        (p.layer, p.offset, p.size_bytes) for p in record.layout.pieces
    ]
    for layer in record.layout.span.layers:
        for tensor in record.layout.group.tensors:
            assert stream.tensor(layer, tensor.name).tobytes() == record.tensor(layer, tensor.name).tobytes()


def test_sealing_clears_what_the_slot_held_before() -> None:
    record = state_record()
    assert record.layout.gaps, "the toy state should have padding"
    again = fill(record.layout, STATE_HEADER, seed=0)
    again_on_zeros = Record(record.layout, memoryview(bytearray(record.layout.slot_bytes)))
    for piece in range(len(record.layout.pieces)):
        again_on_zeros.piece(piece)[:] = record.piece(piece)
    again_on_zeros.checksums[:] = again_on_zeros.compute_checksums()
    again_on_zeros.seal(STATE_HEADER)
    assert bytes(again.memory) == bytes(again_on_zeros.memory)


@pytest.mark.parametrize("make", RECORDS)
def test_checking_many_records_finds_what_checking_each_does(make: Callable[[], Record]) -> None:
    record = make()
    layout, header = record.layout, record.header()
    memories = [bytearray(record.memory) for _ in range(5)]
    addresses = np.array([address_of(memoryview(memory)) for memory in memories], np.uint64)
    assert which_intact(layout, addresses, [header] * 5).tolist() == [True] * 5
    assert which_intact(layout, addresses[:0], []).tolist() == []
    gaps = [offset for offset, _ in layout.gaps]
    edges = [layout.header_bytes - 1, layout.header_bytes, layout.checksum_offset, layout.record_bytes - 1]
    pieces = [piece.offset + piece.size_bytes - 1 for piece in layout.pieces]
    for at in sorted({*range(0, layout.header_bytes, 7), *layout.field_offsets.values(), *gaps, *edges, *pieces}):
        memories[3][at] ^= 1
        try:
            is_sound = Record(layout, memoryview(memories[3])).verify() == header
        except (RecordError, ChecksumError):
            is_sound = False
        assert which_intact(layout, addresses, [header] * 5).tolist() == [True, True, True, is_sound, True], at
        memories[3][at] ^= 1
    other = RecordHeader(**{**vars(header), "cost_us": header.cost_us + 1})
    assert which_intact(layout, addresses, [header, other, header, header, other]).tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {"key": b"short"},
        {"grid": bytes(33)},
        {"valid_tokens": 8},
        {"valid_tokens": -1},
        {"end_tokens": 0, "valid_tokens": 0},
        {"end_tokens": 1 << 40},
        {"cost_us": -1},
    ],
)
def test_a_header_that_cannot_be_written_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        RecordHeader(**{**vars(HEADER), **fields})


def test_a_large_cost_is_cut_to_its_field() -> None:
    header = RecordHeader(**{**vars(HEADER), "cost_us": 10**20})
    record = attention_record()
    record.seal(header)
    assert record.header().cost_us == 10**16 - 1


def test_names_that_a_schema_cannot_carry_are_refused() -> None:
    for tensor, segment in (("crc32c", "heads"), ("keys", "he:ads"), ("keys", "he,ads")):
        spec_tensor = TensorSpec(tensor, DType.INT8, (Segment("heads", 1, 1),), (1,), has_tokens=True)
        object.__setattr__(spec_tensor.segments[0], "name", segment)
        group = CacheGroup("g", ReuseRule.ATTENTION, (0,), (spec_tensor,))
        with pytest.raises(SpecError):
            record_layout(ModelSpec("m", "w", 4, (group,)), 0, 0, UnitRange(0, 1))


def test_a_shard_without_any_rows_has_no_record() -> None:
    tensors = tuple(
        TensorSpec(f"t{units}", DType.INT8, (Segment("heads", units, 1),), (), has_tokens=False) for units in (2, 3)
    )
    spec = ModelSpec("m", "w", 4, (CacheGroup("g", ReuseRule.STATE, (0,), tensors),))
    assert len(record_layout(spec, 0, 0, UnitRange(0, 1)).pieces) == 2
    with pytest.raises(SpecError, match="no rows"):
        record_layout(spec, 0, 0, UnitRange(1, 2))


# Views


def test_views_are_read_only_and_share_memory() -> None:
    record = attention_record()
    for view in (record.tensor(1, "keys"), read_record_stream(write_record_stream(record)).tensor(1, "keys")):
        assert view.shape == (2, 4, 3)
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0, 0] = 1
    assert np.shares_memory(record.tensor(1, "keys"), np.frombuffer(record.memory, np.uint8))
    assert bytes(record.tensor(3, "values").data) == b"".join(bytes(record.piece(i)) for i in (6, 7))
    batch = record.to_arrow()
    assert not batch.column(0).storage.flatten().buffers()[1].is_mutable
    with pytest.raises(RecordError, match="not layer 2"):
        record.tensor(2, "keys")
    with pytest.raises(RecordError, match="'conv'"):
        record.tensor(1, "conv")


def test_the_arrow_c_data_interface_carries_a_record() -> None:
    record = attention_record()
    batch = record.to_arrow()
    schema_capsule, array_capsule = batch.__arrow_c_array__()
    again = pa.RecordBatch._import_from_c_capsule(schema_capsule, array_capsule)
    again.validate(full=True)
    assert again.schema.equals(record.layout.schema, check_metadata=True)
    assert (
        again.column(0).storage.flatten().buffers()[1].address == batch.column(0).storage.flatten().buffers()[1].address
    )
    base = np.frombuffer(record.memory, np.uint8).ctypes.data
    assert batch.column(0).storage.flatten().buffers()[1].address == base + record.layout.column_offsets[0]


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT8_E5M2])
def test_dlpack_gives_the_values_without_a_copy(dtype: DType) -> None:
    record = attention_record(toy_spec(dtype=dtype))
    exported = np.from_dlpack(record.to_arrow().column(0).storage.flatten())
    assert not exported.flags.writeable
    assert np.array_equal(exported[:24].reshape(2, 4, 3), record.tensor(1, "keys"), equal_nan=dtype.is_native)
    assert np.shares_memory(exported, np.frombuffer(record.memory, np.uint8))
    view = np.from_dlpack(record.tensor(1, "keys"))
    assert np.shares_memory(view, exported)


def test_arrow_shows_tokens_before_rows() -> None:
    record = attention_record()
    logical = record.to_arrow().column(0).to_numpy_ndarray()
    assert logical.shape == (2, 4, 2, 3)
    assert np.array_equal(logical[1], record.tensor(3, "keys").swapaxes(0, 1), equal_nan=True)


# Damage


@pytest.mark.parametrize("make", RECORDS)
def test_every_flipped_byte_outside_the_tensors_is_noticed(make: Callable[[], Record]) -> None:
    """In a slot: framing, its padding, the checksum column and the padding between columns."""
    record = make()
    layout = record.layout
    tensor_bytes = {at for piece in layout.pieces for at in range(piece.offset, piece.offset + piece.size_bytes)}
    intact = bytes(record.memory)
    for at in range(layout.record_bytes):
        if at in tensor_bytes:
            continue
        record.memory[at] ^= 1 << at % 8
        with pytest.raises(RecordError):
            record.verify()
        record.memory[at] = intact[at]
    assert record.verify()


@pytest.mark.parametrize("make", RECORDS)
def test_every_flipped_byte_of_the_tensors_is_noticed(make: Callable[[], Record]) -> None:
    record = make()
    for number, piece in enumerate(record.layout.pieces):
        for at in range(piece.offset, piece.offset + piece.size_bytes):
            record.memory[at] ^= 1 << at % 8
            assert record.header()
            tensor = record.layout.group.tensors[piece.tensor].name
            with pytest.raises(
                ChecksumError, match=rf"1 of .*layer {piece.layer}, tensor '{tensor}', unit {piece.unit}"
            ):
                record.verify()
            assert np.flatnonzero(record.compute_checksums() != record.checksums).tolist() == [number]
            record.memory[at] ^= 1 << at % 8


def test_a_slot_that_is_too_short_is_refused() -> None:
    record = attention_record()
    with pytest.raises(RecordError, match="truncated"):
        Record(record.layout, record.memory[:-1])


# Other classes


def test_a_record_of_another_class_is_refused_by_a_layout() -> None:
    """Also where all shapes are the same: other weights, or the other shard."""
    record = attention_record()
    first, second = (record_layout(toy_spec(), 0, 0, UnitRange(unit, unit + 1)) for unit in (0, 1))
    shard = fill(first, HEADER)
    assert len(first.header_template) == len(second.header_template)
    for layout, memory in (
        (record_layout(toy_spec("other weights"), 0, 0, UnitRange(0, 2)), record.memory),
        (record_layout(toy_spec(dtype=DType.INT32), 0, 0, UnitRange(0, 2)), record.memory),
        (second, shard.memory),
        (record_layout(toy_spec(), 1, 0, UnitRange(0, 4)), record.memory),
    ):
        with pytest.raises(RecordError, match="class"):
            Record(layout, memory).header()
        with pytest.raises(RecordError):
            Record(layout, memory).to_arrow()


def test_a_layout_refuses_tokens_that_its_group_cannot_hold() -> None:
    record = attention_record()
    record.seal(RecordHeader(**{**vars(HEADER), "valid_tokens": 4}))
    with pytest.raises(RecordError, match="holds 4 tokens at 7"):
        record.header()
