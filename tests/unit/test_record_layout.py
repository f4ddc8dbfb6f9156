"""Where the pieces of a record lie, for random specs."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.record import (
    RecordHeader,
    RecordLayout,
    read_record_stream,
    record_layout,
    write_record_stream,
)
from kvstore.record.header import FIELD_WIDTHS, blank_field
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec, UnitRange
from tests.format.records import attention_record, fill, toy_spec


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Random groups: any rule, segments, replication, types and inner axes."""
    block_tokens = draw(st.sampled_from([1, 3, 16]))
    rule = draw(st.sampled_from(ReuseRule))
    window = draw(st.none() | st.integers(1, 9)) if rule is ReuseRule.STATE else None
    has_tokens = rule is ReuseRule.ATTENTION or window is not None
    tensors = []
    for number in range(draw(st.integers(1, 3))):
        segments = []
        for part in range(draw(st.integers(1, 3))):
            units = draw(st.sampled_from([1, 2, 4]))
            replicated = units == 1 and draw(st.booleans())
            segments.append(Segment(f"s{part}", units, draw(st.integers(1, 3)), replicated))
        inner = tuple(draw(st.lists(st.integers(1, 5), max_size=2)))
        tensors.append(TensorSpec(f"t{number}", draw(st.sampled_from(DType)), tuple(segments), inner, has_tokens))
    layers = tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=4))))
    return ModelSpec("random", "w", block_tokens, (CacheGroup("g", rule, layers, tuple(tensors), window),))


@given(specs(), st.integers(1, 4), st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_layouts_of_random_specs(spec: ModelSpec, shards: int, data: st.DataObject) -> None:
    group = spec.groups[0]
    shards = shards if group.unit_count % shards == 0 else 1
    held: list[tuple[int, str, int, int]] = []
    for shard in range(shards):
        share = group.unit_count // shards
        layout = record_layout(spec, 0, 0, UnitRange(shard * share, (shard + 1) * share))
        check_layout(layout)
        held.extend((p.layer, group.tensors[p.tensor].name, p.segment, p.unit) for p in layout.pieces)
        end_tokens = data.draw(st.integers(1, 40))
        valid_tokens = group.valid_tokens(spec.block_tokens, end_tokens)
        record = fill(layout, RecordHeader(b"k" * 32, b"p" * 32, end_tokens, valid_tokens, b"g" * 32))
        record.verify()
        stream = read_record_stream(write_record_stream(record))
        found = [(p.layer, p.tensor, p.unit, p.rows, p.offset, p.size_bytes) for p in stream.pieces]
        assert found == [
            (p.layer, group.tensors[p.tensor].name, p.unit, p.rows, p.offset, p.size_bytes) for p in layout.pieces
        ]
    # The shards together hold every unit of every segment once, however many they are.
    every = [
        (layer, tensor.name, number, unit)
        for layer in group.layers
        for tensor in group.tensors
        for number, segment in enumerate(tensor.segments)
        for unit in range(segment.units)
    ]
    assert sorted(held) == sorted(every)


def check_layout(layout: RecordLayout) -> None:
    assert layout.header_bytes % 4096 == 0
    assert layout.slot_bytes % 4096 == 0
    assert layout.record_bytes <= layout.slot_bytes < layout.record_bytes + 4096
    # Disjoint, inside the body, and what is left is the checksum column and the padding.
    covered = np.zeros(layout.record_bytes, np.uint8)
    covered[: layout.header_bytes] = 1
    parts = [(piece.offset, piece.size_bytes) for piece in layout.pieces]
    for offset, size_bytes in [*parts, (layout.checksum_offset, layout.checksum_bytes), *layout.gaps]:
        assert layout.header_bytes <= offset <= offset + size_bytes <= layout.record_bytes
        assert not covered[offset : offset + size_bytes].any()
        covered[offset : offset + size_bytes] = 1
    assert covered.all()
    assert sum(size for _, size in layout.gaps) < 8 * (len(layout.columns) + 1)
    assert layout.piece_offsets.tolist() == [offset for offset, _ in parts]
    assert layout.piece_sizes.tolist() == [size_bytes for _, size_bytes in parts]
    # Layer-major, tensors in their order, each tensor of a layer contiguous and whole.
    assert [piece.layer for piece in layout.pieces] == sorted(piece.layer for piece in layout.pieces)
    record = fill(
        layout,
        RecordHeader(b"k" * 32, b"p" * 32, 40, layout.group.valid_tokens(layout.spec.block_tokens, 40), b"g" * 32),
    )
    batch = record.to_arrow()
    base = np.frombuffer(record.memory, np.uint8).ctypes.data
    for row, layer in enumerate(layout.span.layers):
        ids: list[int] = []
        for column, index in enumerate(layout.columns):
            pieces = layout.tensor_pieces(layer, index)
            ids.extend(pieces)
            tensor = record.tensor(layer, layout.group.tensors[index].name)
            storage = batch.column(column).storage
            layer_bytes = storage.type.list_size * storage.type.value_type.bit_width // 8
            assert tensor.nbytes == layer_bytes == sum(layout.pieces[i].size_bytes for i in pieces)
            assert tensor.ctypes.data == storage.flatten().buffers()[1].address + row * layer_bytes
            at = tensor.ctypes.data - base
            for i in pieces:
                assert layout.pieces[i].offset == at
                at += layout.pieces[i].size_bytes
        assert ids == list(layout.layer_pieces(layer))
    checksums = batch.column("crc32c").flatten().buffers()[1]
    assert checksums.address - base == layout.checksum_offset


def test_every_field_of_the_template_is_blank() -> None:
    layout = attention_record().layout
    for name, width in FIELD_WIDTHS.items():
        offset = layout.field_offsets[name]
        assert layout.header_template[offset : offset + width] == blank_field(name)
    assert record_layout(toy_spec(), 0, 0, UnitRange(0, 2)) is layout, "built once"
