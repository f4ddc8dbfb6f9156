"""The spec core: shard units, groups, spans, fingerprints, and configurations without transformers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import lcm
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvstore.errors import SpecError, UnsupportedModelError
from kvstore.limits import BLOCK_TOKENS_MAX, LAYERS_MAX, MIB, RECORD_BYTES_MAX, SHARD_UNITS_MAX, SPAN_BYTES_MAX
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, Shard, TensorSpec, UnitRange

HEADS = Segment("heads", 4, 1)
KEYS = TensorSpec("keys", DType.BFLOAT16, (HEADS,), (16,), has_tokens=True)
VALUES = TensorSpec("values", DType.BFLOAT16, (HEADS,), (16,), has_tokens=True)
CONV = TensorSpec(
    "conv",
    DType.BFLOAT16,
    (Segment("query", 2, 16), Segment("key", 2, 16), Segment("value", 4, 8)),
    (4,),
    has_tokens=False,
)
RECURRENT = TensorSpec("recurrent", DType.FLOAT32, (HEADS,), (16, 8), has_tokens=False)
ATTENTION = CacheGroup("attention", ReuseRule.ATTENTION, (1, 3), (KEYS, VALUES))
STATE = CacheGroup("state", ReuseRule.STATE, (0, 2), (CONV, RECURRENT))
WINDOW = CacheGroup("window", ReuseRule.STATE, (4,), (KEYS, VALUES), window_tokens=15)
SPEC = ModelSpec("hand", "sha256:00", 16, (ATTENTION, STATE, WINDOW), (("rope.theta", "10000"),))

FINGERPRINT = "de653e95c06c3fd44d8cffe524f1752c06a50f7a9ddf3975e318dbab4fd9884d"
CONFIG_FINGERPRINT = "4df11f5c9db7795d70ec439061b3cc748236bcccf17592fe5d1b4f1a1c18968a"
"""Pinned: a change means that every stored cache is lost to its users, so it needs a new domain string."""


def config(**fields: Any) -> SimpleNamespace:
    """A configuration as from_transformers reads one, without transformers."""
    base = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return SimpleNamespace(**{**base, **fields})


def spec_of(**fields: Any) -> ModelSpec:
    return ModelSpec.from_transformers(config(**fields), weights="w", block_tokens=16)


def test_sizes_and_shapes() -> None:
    assert KEYS.shape(4, 16) == (4, 16, 16)
    assert KEYS.nbytes(16) == 4 * 16 * 16 * 2
    assert KEYS.unit_bytes(HEADS, 16) == 16 * 16 * 2
    assert CONV.rows == 32 + 32 + 32
    assert CONV.shape(CONV.rows, 16) == (96, 4)
    assert CONV.unit_bytes(CONV.segments[2], 99) == 8 * 4 * 2
    assert RECURRENT.nbytes(5) == 4 * 16 * 8 * 4
    assert sum(CONV.unit_bytes(s, 0) * s.units for s in CONV.segments) == CONV.nbytes(0)


def test_capacity_and_validity() -> None:
    assert ATTENTION.capacity_tokens(16) == 16
    assert [ATTENTION.valid_tokens(16, end) for end in (1, 15, 16, 17, 32)] == [1, 15, 16, 1, 16]
    assert [WINDOW.valid_tokens(16, end) for end in (1, 14, 15, 16, 400)] == [1, 14, 15, 15, 15]
    assert WINDOW.capacity_tokens(16) == 15
    assert STATE.capacity_tokens(16) == STATE.valid_tokens(16, 5) == 0


def test_groups_of_a_spec() -> None:
    assert SPEC.layers == (0, 1, 2, 3, 4)
    assert SPEC.attention_groups == (0,)
    assert SPEC.state_groups == (1, 2)
    assert SPEC.group_index(3, "keys") == 0
    assert SPEC.group_index(4, "keys") == 2
    with pytest.raises(SpecError, match="layer 1 has no tensor 'conv'; it has keys, values"):
        SPEC.group_index(1, "conv")
    with pytest.raises(SpecError, match="layer 9 has no cache in this spec; it has"):
        SPEC.group_index(9, "keys")


def test_spans_fill_up_to_the_limit() -> None:
    tensor = TensorSpec("keys", DType.FLOAT32, (Segment("heads", 8, 1),), (4096,), has_tokens=True)
    group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(10)), (tensor,))
    assert group.layer_bytes(16) == 2 * MIB
    assert [span.layers for span in group.spans(16)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [span.index for span in group.spans(16)] == [0, 1, 2]
    large = replace(group, layers=(0, 5))
    assert large.layer_bytes(128) > SPAN_BYTES_MAX
    assert [span.layers for span in large.spans(128)] == [(0,), (5,)]
    huge = replace(tensor, inner=(4 * RECORD_BYTES_MAX // 8 // 4 // 4,))
    with pytest.raises(SpecError, match=str(RECORD_BYTES_MAX)):
        ModelSpec("m", "w", 16, (replace(group, tensors=(huge,)),))


segments = st.builds(
    lambda units, rows, replicated: Segment("s", 1 if replicated else units, rows, replicated),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(1, 3),
    st.booleans(),
)


@given(st.lists(segments, min_size=1, max_size=4), st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_workers_write_everything_once_and_read_what_they_hold(parts: list[Segment], count: int) -> None:
    tensor = TensorSpec("conv", DType.INT8, tuple(parts), (), has_tokens=False)
    group = CacheGroup("state", ReuseRule.STATE, (0,), (tensor,))
    assert group.unit_count == lcm(*(part.units for part in parts))
    shards = [Shard(index, count) for index in range(count)]
    try:
        written = [group.units_written_by(shard) for shard in shards]
        held = [{part: shard.units_of(part) for part in parts} for shard in shards]
    except SpecError:
        assume(False)
    ranges = [units for units in written if units is not None]
    assert sorted(unit for units in ranges for unit in range(units.start, units.stop)) == list(range(group.unit_count))
    for part in parts:
        stored = [unit for units in ranges for unit in group.segment_units(part, units)]
        assert sorted(stored) == list(range(part.units))
        for shard, units in zip(shards, written, strict=True):
            if units is not None:
                assert set(group.segment_units(part, units)) <= set(held[shard.index][part])
        for shard in shards:
            need = group.units_read_by(shard)
            offered = {u for unit in need for u in group.segment_units(part, UnitRange(unit, unit + 1))}
            assert set(held[shard.index][part]) <= offered


def test_units_of_few_heads_are_shared_by_neighbours() -> None:
    two = Segment("heads", 2, 1)
    assert [list(Shard(index, 4).units_of(two)) for index in range(4)] == [[0], [0], [1], [1]]
    assert [list(Shard(index, 2).units_of(HEADS)) for index in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(SpecError, match="4 units of segment 'heads' split over 3 workers"):
        Shard(0, 3).units_of(HEADS)


def test_equal_specs_have_equal_fingerprints() -> None:
    assert SPEC.fingerprint.hex() == FINGERPRINT
    again = ModelSpec.from_json(SPEC.to_json())
    assert again == SPEC
    assert again.fingerprint == SPEC.fingerprint
    assert again.to_json() == SPEC.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "hand2"},
        {"weights": "sha256:01"},
        {"block_tokens": 32},
        {"numerics": ()},
        {"numerics": (("rope.theta", "10001"),)},
        {"groups": (STATE, ATTENTION, WINDOW)},
        {"groups": (ATTENTION, STATE)},
        {"groups": (ATTENTION, STATE, replace(WINDOW, window_tokens=14))},
        {"groups": (ATTENTION, STATE, replace(WINDOW, layers=(5,)))},
        {"groups": (ATTENTION, replace(STATE, tensors=(CONV, replace(RECURRENT, inner=(8, 16)))), WINDOW)},
        {"groups": (ATTENTION, replace(STATE, tensors=(CONV, replace(RECURRENT, dtype=DType.BFLOAT16))), WINDOW)},
        {
            "groups": (
                ATTENTION,
                replace(
                    STATE, tensors=(replace(CONV, segments=(Segment("query", 4, 8), *CONV.segments[1:])), RECURRENT)
                ),
                WINDOW,
            )
        },
    ],
)
def test_every_difference_shows_in_the_fingerprint(change: dict[str, Any]) -> None:
    assert replace(SPEC, **change).fingerprint != SPEC.fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SPEC, weights=""), "weights="),
        (lambda: replace(SPEC, weights=" "), "weights="),
        (lambda: replace(SPEC, weights=None), "weights="),
        (lambda: replace(SPEC, block_tokens=0), "block_tokens"),
        (lambda: replace(SPEC, block_tokens=BLOCK_TOKENS_MAX + 1), "block_tokens"),
        (lambda: replace(SPEC, groups=()), "groups"),
        (lambda: replace(SPEC, groups=(ATTENTION, replace(STATE, name="attention"))), "same name"),
        (lambda: replace(SPEC, groups=(ATTENTION, replace(ATTENTION, name="b"))), "in two groups"),
        (lambda: replace(SPEC, groups=(replace(ATTENTION, layers=(LAYERS_MAX,)),)), str(LAYERS_MAX)),
        (lambda: replace(SPEC, numerics=(("b", "1"), ("a", "1"))), "sorted"),
        (lambda: replace(SPEC, numerics=(("a", "1"), ("a", "2"))), "each name once"),
        (lambda: replace(ATTENTION, layers=()), "ascending"),
        (lambda: replace(ATTENTION, layers=(2, 1)), "ascending"),
        (lambda: replace(ATTENTION, layers=(-1,)), "ascending"),
        (lambda: replace(ATTENTION, tensors=()), "0 tensors"),
        (lambda: replace(ATTENTION, tensors=(KEYS, KEYS)), "twice"),
        (lambda: replace(ATTENTION, tensors=(RECURRENT,)), "needs a token axis"),
        (lambda: replace(STATE, tensors=(KEYS,)), "must not have a token axis"),
        (lambda: replace(ATTENTION, window_tokens=4), "only a state group"),
        (lambda: replace(WINDOW, window_tokens=0), "at least one token"),
        (lambda: replace(KEYS, name="a b"), "identifier"),
        (lambda: replace(KEYS, segments=()), "no segments"),
        (lambda: replace(KEYS, inner=(0,)), "empty axis"),
        (lambda: Segment("s", 0, 1), "shard units"),
        (lambda: Segment("s", SHARD_UNITS_MAX + 1, 1), str(SHARD_UNITS_MAX)),
        (lambda: Segment("s", 1, 0), "rows per unit"),
        (lambda: Segment("s", 2, 1, replicated=True), "replicated"),
        (lambda: Shard(2, 2), "out of range"),
        (lambda: UnitRange(3, 3), "not a range"),
        (
            lambda: replace(STATE, tensors=(replace(CONV, segments=(Segment("a", 89, 1), Segment("b", 97, 1))),)),
            "common shard units",
        ),
    ],
)
def test_bad_specs(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"model": 1}', SPEC.to_json().replace("attention", "guess"), "\x00"]
)
def test_bad_json(text: str) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_json(text)


def test_element_types() -> None:
    assert DType.parse("bfloat16") is DType.BFLOAT16
    assert DType.parse("torch.float16") is DType.FLOAT16
    assert DType.parse(np.float32) is DType.FLOAT32
    assert DType.parse(np.dtype("<i4")) is DType.INT32
    assert DType.BFLOAT16.storage == np.uint16
    assert not DType.BFLOAT16.is_native
    assert all(dtype.storage.itemsize == dtype.itemsize for dtype in DType)
    for bad in (None, "float7", object(), np.complex64, "object"):
        with pytest.raises(SpecError, match="element type"):
            DType.parse(bad)


def test_a_configuration_need_not_come_from_transformers() -> None:
    spec = spec_of()
    assert spec.model == "llama"
    assert spec.fingerprint.hex() == CONFIG_FINGERPRINT
    (group,) = spec.groups
    assert (group.name, group.layers, group.rule) == ("attention", (0, 1), ReuseRule.ATTENTION)
    assert [tensor.shape(tensor.rows, 16) for tensor in group.tensors] == [(2, 16, 16)] * 2


def test_what_changes_bytes_changes_the_fingerprint_and_nothing_else_does() -> None:
    base = spec_of().fingerprint
    for fields in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"dtype": "float16"},
        {"quantization_config": {"bits": 4}},
        {"quantization_config": SimpleNamespace(to_dict=lambda: {"bits": 8})},
        {"model_type": "mistral", "sliding_window": 8},
    ):
        assert spec_of(**fields).fingerprint != base, fields
    for fields in (
        {"transformers_version": "9.9"},
        {"_name_or_path": "/somewhere"},
        {"use_cache": False},
        {"attention_dropout": 0.1},
        {"eos_token_id": [1, 2]},
        {"hidden_act": None},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
    ):
        assert spec_of(**fields).fingerprint == base, fields
    four, eight = ({"quantization_config": {"bits": bits}} for bits in (4, 8))
    assert spec_of(**four).fingerprint != spec_of(**eight).fingerprint
    assert spec_of(time_limits=(0.0, float("inf"))).fingerprint == spec_of(time_limits=[0, float("inf")]).fingerprint


def test_fingerprints_do_not_depend_on_the_process() -> None:
    script = (
        "from tests.unit.test_spec import SPEC, spec_of\n"
        "print(SPEC.fingerprint.hex(), spec_of().fingerprint.hex(), spec_of(names={'a', 'b', 'c'}).fingerprint.hex())"
    )
    outputs = set()
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        outputs.add(done.stdout)
    (output,) = outputs
    assert output.split()[:2] == [FINGERPRINT, CONFIG_FINGERPRINT]


def test_further_numerics() -> None:
    spec = ModelSpec.from_transformers(config(), weights="w", numerics={"kernel": "flash"})
    assert dict(spec.numerics)["kernel"] == "flash"
    assert spec.fingerprint != ModelSpec.from_transformers(config(), weights="w").fingerprint
    with pytest.raises(SpecError, match=r"config\.sha256"):
        ModelSpec.from_transformers(config(), weights="w", numerics={"config.sha256": "0"})


def test_dtype_comes_from_the_argument_or_the_configuration() -> None:
    assert spec_of().groups[0].tensors[0].dtype is DType.BFLOAT16
    spec = ModelSpec.from_transformers(config(dtype=None), weights="w", dtype="float16")
    assert spec.groups[0].tensors[0].dtype is DType.FLOAT16
    with pytest.raises(SpecError, match="dtype="):
        spec_of(dtype=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "jamba"}, "jamba.*starts the recurrence at zero"),
        ({"model_type": "novel"}, "novel.*llama.*by hand"),
        ({"model_type": None}, "no model_type"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"use_bidirectional_attention": True}, "after it"),
        ({"layer_types": ["full_attention", "conv"]}, "layer 1 is of type 'conv'.*by hand"),
        ({"layer_types": ["full_attention", "novel_attention"]}, "layer 1 is of type 'novel_attention'"),
        ({"layer_types": ["full_attention"]}, "2 layers, but 1 layer_types"),
        ({"kv_sharing_modes": ["reuse", "reuse"]}, "none of its layers"),
        ({"model_type": "mistral", "sliding_window": 1}, "sliding_window=1"),
        ({"sliding_window": 8}, "layer 0 is of type 'sliding_attention'; known for this model are full_attention"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 2.0}, "positive integer"),
        ({"extra": object()}, r"config\.extra is a object"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(**fields)


def test_an_unknown_layer_type_names_itself_as_unsupported() -> None:
    with pytest.raises(UnsupportedModelError):
        spec_of(layer_types=["full_attention", "novel_attention"])


def test_layers_that_read_another_layers_cache_hold_none() -> None:
    spec = spec_of(num_hidden_layers=3, kv_sharing_modes=[None, "store", "reuse"])
    assert spec.groups[0].layers == (0, 1)


def test_layers_of_unequal_shape_form_groups_of_their_own() -> None:
    small, large = config(sliding_window=8), config(num_key_value_heads=4, sliding_window=8)
    layered = config(
        model_type="gemma2",
        num_hidden_layers=4,
        is_heterogeneous=True,
        per_layer_config=[small, large, small, large],
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )
    layered.to_dict = lambda: {"model_type": "gemma2"}
    spec = ModelSpec.from_transformers(layered, weights="w")
    assert [(group.name, group.layers) for group in spec.groups] == [
        ("attention", (0,)),
        ("attention_2", (1,)),
        ("window", (2,)),
        ("window_2", (3,)),
    ]
    assert [group.tensors[0].rows for group in spec.groups] == [2, 4, 2, 4]


@pytest.mark.parametrize(("kv_heads", "heads"), list(product([None, 2], [2, 4])))
def test_key_value_heads_default_to_the_heads(kv_heads: int | None, heads: int) -> None:
    spec = spec_of(num_key_value_heads=kv_heads, num_attention_heads=heads)
    assert spec.groups[0].tensors[0].rows == (kv_heads or heads)
    assert spec.groups[0].tensors[0].inner == (64 // heads,)


def test_the_hand_written_spec_of_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "model-spec.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    spec = names["spec"]
    assert [(group.name, len(group.layers)) for group in spec.groups] == [("attention", 40), ("state", 40)]
    assert [tensor.rows for tensor in spec.groups[1].tensors] == [(8 + 2) * 128, 128]
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_bytes_of_a_prefix_by_group_and_shard() -> None:
    heads = (Segment("heads", 4, 1),)
    attention = CacheGroup(
        "attention", ReuseRule.ATTENTION, (0, 1), (TensorSpec("keys", DType.FLOAT32, heads, (8,), True),)
    )
    window = CacheGroup(
        "window",
        ReuseRule.STATE,
        (2,),
        (TensorSpec("values", DType.BFLOAT16, heads, (8,), True),),
        window_tokens=10,
    )
    state = CacheGroup("state", ReuseRule.STATE, (3,), (TensorSpec("conv", DType.FLOAT32, heads, (3,), False),))
    spec = ModelSpec("toy", "w", 16, (attention, window, state))
    assert spec.bytes_by_group(100) == {"attention": 2 * 4 * 8 * 4 * 100, "window": 4 * 8 * 2 * 10, "state": 4 * 3 * 4}
    assert spec.bytes_by_group(5)["window"] == 4 * 8 * 2 * 5
    assert spec.bytes_by_group(100, Shard(1, 2)) == {name: size // 2 for name, size in spec.bytes_by_group(100).items()}
