"""vLLM's cache groups as the mapping layer takes them: whole models out of one rank's shapes, refusals by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.errors import SpecError, UnsupportedModelError
from kvstore.spec import DType, ReuseRule, Segment

torch = pytest.importorskip("torch")

from kvstore.adapters.paged import group_names, layer_number, spec_of  # noqa: E402
from kvstore.adapters.vllm.facts import KeyValueLayout, ModelFacts, key_value_layout, layouts_of  # noqa: E402
from kvstore.adapters.vllm.groups import cache_numerics, engine_groups  # noqa: E402
from tests.paged_engine import (  # noqa: E402
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    Group,
    MambaSpec,
    Mechanism,
    MLAAttentionSpec,
    Quantization,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    model_groups,
)

ATTENTION: dict[str, Any] = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "head_size_v": 64}


def of(spec: Any, *names: str, **facts: Any) -> Any:
    """The one engine group of a spec."""
    found = engine_groups(
        [Group(layer_names=list(names) or ["model.layers.3.attn"], kv_cache_spec=spec)], ModelFacts(**facts)
    )
    assert len(found) == 1
    return found[0]


def segments(group: Any, number: int) -> list[tuple[str, int, int, bool]]:
    return [(each.name, each.units, each.unit_rows, each.replicated) for each in group.tensors[number].spec.segments]


# What vLLM 0.32 was seen to have


def test_qwen3_next() -> None:
    """Three groups of one gated-delta layer each and one of attention become two groups of the spec."""
    state = MambaSpec(
        block_size=256,
        shapes=((3, 512), (2, 128, 128)),
        dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=262144,
    )
    full = FullAttentionSpec(block_size=256, num_kv_heads=2, head_size=128, head_size_v=128, dtype=torch.bfloat16)
    given = [Group(layer_names=[f"model.layers.{layer}.linear_attn"], kv_cache_spec=state) for layer in range(3)]
    given.append(Group(layer_names=["model.layers.3.self_attn.attn"], kv_cache_spec=full))
    groups = engine_groups(given, ModelFacts())
    assert [(group.index, group.layers, group.page_tokens) for group in groups] == [
        (0, (0,), 256),
        (1, (1,), 256),
        (2, (2,), 256),
        (3, (3,), 256),
    ]
    assert group_names(groups) == ("state", "state", "state", "attention")
    spec = spec_of(groups, model="qwen3_next", weights="w", block_tokens=64)
    assert [(group.name, group.layers) for group in spec.groups] == [("attention", (3,)), ("state", (0, 1, 2))]
    conv, recurrent = spec.groups[1].tensors
    assert conv.segments == (Segment("query", 1, 128), Segment("key", 1, 128), Segment("value", 2, 128))
    assert (conv.dtype, conv.inner, recurrent.dtype, recurrent.inner) == (
        DType.BFLOAT16,
        (3,),
        DType.FLOAT32,
        (128, 128),
    )
    assert [tensor.offset_bytes for tensor in groups[0].tensors] == [0, 3 * 512 * 2]


def test_gemma_3() -> None:
    window = SlidingWindowSpec(**ATTENTION, sliding_window=256)
    given = [
        Group(layer_names=["model.layers.0.self_attn.attn", "model.layers.2.self_attn.attn"], kv_cache_spec=window),
        Group(
            layer_names=["model.layers.3.self_attn.attn", "model.layers.1.self_attn.attn"],
            kv_cache_spec=FullAttentionSpec(**ATTENTION),
        ),
    ]
    groups = engine_groups(given, ModelFacts())
    assert [(group.rule, group.layers, group.window_tokens) for group in groups] == [
        (ReuseRule.STATE, (0, 2), 255),
        (ReuseRule.ATTENTION, (1, 3), None),
    ]
    assert groups[1].names == ("model.layers.1.self_attn.attn", "model.layers.3.self_attn.attn")
    assert [group.name for group in spec_of(groups, model="gemma3", weights="w").groups] == ["attention", "window"]


# The same spec for every number of ranks


@pytest.mark.parametrize("model", ["dense", "window", "chunks", "latent", "hybrid", "mamba2", "uneven"])
def test_ranks_and_pages_are_no_part_of_the_spec(model: str) -> None:
    def fingerprint(ranks: int, page_tokens: int) -> bytes:
        facts = ModelFacts(ranks=ranks, kv_heads=2, mamba_groups=4)
        groups = engine_groups(model_groups(model, page_tokens, ranks=ranks), facts)
        return spec_of(groups, model=model, weights="w").fingerprint

    assert len({fingerprint(ranks, page_tokens) for ranks in (1, 2, 4) for page_tokens in (16, 256)}) == 1


def test_how_the_engine_groups_layers_is_no_part_of_the_spec() -> None:
    full = FullAttentionSpec(**ATTENTION)
    names = [f"model.layers.{layer}.attn" for layer in range(4)]
    together = [Group(layer_names=names, kv_cache_spec=full)]
    apart = [Group(layer_names=names[::2], kv_cache_spec=full), Group(layer_names=names[1::2], kv_cache_spec=full)]
    uniform = UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs=dict.fromkeys(names, full))
    forms = (together, apart, [Group(layer_names=names, kv_cache_spec=uniform)])
    assert len({spec_of(engine_groups(form, ModelFacts()), model="m", weights="w") for form in forms}) == 1


def test_layers_of_other_sizes_under_one_table() -> None:
    """They are groups of their own, and share the table."""
    groups = engine_groups(model_groups("uneven", 64), ModelFacts())
    assert [(group.index, group.layers) for group in groups] == [(0, (0, 2)), (0, (1,))]
    assert group_names(groups) == ("attention", "attention_2")


@pytest.mark.parametrize(
    ("own", "ranks", "total", "shards"), [(4, 2, 8, None), (1, 4, 2, None), (1, 8, 8, None), (1, 4, 1, 1), (2, 4, 8, 4)]
)
def test_heads_of_all_ranks(own: int, ranks: int, total: int, shards: int | None) -> None:
    spec = FullAttentionSpec(**{**ATTENTION, "num_kv_heads": own}, max_tp_shards=shards)
    given = None if shards else total
    assert segments(of(spec, ranks=ranks, kv_heads=given), 0) == [("heads", total, 1, False)]
    if not shards:
        assert segments(of(spec, ranks=ranks, kv_heads={3: total}), 0) == [("heads", total, 1, False)]


def test_heads_that_cannot_be_told() -> None:
    spec = FullAttentionSpec(**ATTENTION)
    with pytest.raises(UnsupportedModelError, match="2 heads on each of 2 ranks; of how many"):
        of(spec, ranks=2)
    with pytest.raises(UnsupportedModelError, match="of how many"):
        of(spec, ranks=2, kv_heads={7: 4})
    for wrong in (2, 5, 8):
        with pytest.raises(UnsupportedModelError, match=f"which are not {wrong} together"):
            of(spec, ranks=2, kv_heads=wrong)


# States over ranks: the classes of vLLM's #49499 and #55208


def test_gated_delta_states_split_by_their_own_parts() -> None:
    spec = MambaSpec(
        block_size=64, shapes=((3, 2 * 2 * 16 + 4 * 8), (4, 8, 16)), dtypes=(torch.bfloat16, torch.float32)
    )
    group = of(spec, ranks=2)
    assert segments(group, 0) == [("query", 4, 16, False), ("key", 4, 16, False), ("value", 8, 8, False)]
    assert segments(group, 1) == [("heads", 8, 1, False)]
    assert group.tensors[0].axes == "page inner row"
    assert of(spec, ranks=2, is_channel_first=False) == group
    turned = MambaSpec(block_size=64, shapes=((96, 3), (4, 8, 16)), dtypes=(torch.bfloat16, torch.float32))
    assert of(turned, ranks=2, is_channel_first=True).tensors[0].axes == "page row inner"
    assert of(turned, ranks=2, is_channel_first=True).tensors[0].spec == group.tensors[0].spec


@pytest.mark.parametrize(("own_groups", "ranks", "total"), [(2, 1, 2), (1, 1, 1), (1, 2, 2), (1, 2, 1), (2, 4, 8)])
def test_mamba_2_groups(own_groups: int, ranks: int, total: int) -> None:
    """One group on each of two ranks is one of two, or one on both: the shapes are the same."""
    shapes = ((3, 4 * 8 + 2 * own_groups * 16), (4, 8, 16))
    spec = MambaSpec(block_size=64, shapes=shapes, dtypes=(torch.bfloat16, torch.float32), mamba_type=Mechanism.MAMBA2)
    group = of(spec, ranks=ranks, mamba_groups=total)
    assert segments(group, 0) == [
        ("x", 4 * ranks, 8, False),
        ("B", total, 16, total == 1),
        ("C", total, 16, total == 1),
    ]
    if ranks > 1:
        with pytest.raises(UnsupportedModelError, match="of how many"):
            of(spec, ranks=ranks)
        with pytest.raises(UnsupportedModelError, match="which are not 3 together"):
            of(spec, ranks=ranks, mamba_groups=3)


def test_other_states() -> None:
    short = MambaSpec(block_size=64, shapes=((2, 48),), dtypes=(torch.float32,), mamba_type=Mechanism.SHORT_CONV)
    assert segments(of(short, ranks=2), 0) == [("channels", 16, 6, False)]
    mamba = MambaSpec(
        block_size=64, shapes=((3, 64), (64, 16)), dtypes=(torch.float32,) * 2, mamba_type=Mechanism.MAMBA1
    )
    assert [segments(of(mamba, ranks=4), number) for number in (0, 1)] == [[("channels", 16, 16, False)]] * 2
    linear = MambaSpec(block_size=64, shapes=((4, 8, 8),), dtypes=(torch.float32,), mamba_type=Mechanism.LINEAR)
    assert segments(of(linear, ranks=2), 0) == [("heads", 8, 1, False)]
    copied = MambaSpec(
        block_size=64, shapes=((2, 48),), dtypes=(torch.float32,), mamba_type=Mechanism.SHORT_CONV, tp_replicated=True
    )
    assert segments(of(copied, ranks=2), 0) == [("replicated", 1, 48, True)]


def test_latents() -> None:
    latent = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    group = of(latent, ranks=8)
    assert segments(group, 0) == [("latent", 1, 1, True)]
    assert group.tensors[0].spec.inner == (576,)
    packed = MLAAttentionSpec(
        block_size=64,
        num_kv_heads=1,
        head_size=576,
        dtype=torch.uint8,
        cache_dtype_str="fp8_ds_mla",
        state_content_bytes=656,
        kv_quant_mode=Quantization.FP8_PER_TENSOR,
    )
    assert (of(packed).tensors[0].spec.dtype, of(packed).tensors[0].spec.inner) == (DType.UINT8, (656,))


# Refusals


def unknown_spec() -> Any:
    return type("BrandNewSpec", (FullAttentionSpec,), {})(**ATTENTION)


def named(kind: str) -> Any:
    return type(kind, (), {})()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (unknown_spec(), "of kind BrandNewSpec, which is not known"),
        (named("CrossAttentionSpec"), "depends on the encoder's input"),
        (named("EncoderOnlyAttentionSpec"), "keeps no cache"),
        (named("SinkFullAttentionSpec"), "sink tokens"),
        (named("CircularBufferSpec"), "ring of tokens"),
        (FullAttentionSpec(**ATTENTION, kv_quant_mode=Quantization.INT8_PER_TOKEN_HEAD), "by INT8_PER_TOKEN_HEAD"),
        (FullAttentionSpec(**ATTENTION, tokens_per_state=4), "4 tokens in one entry"),
        (FullAttentionSpec(**ATTENTION, num_head_slots=4), "4 slots for 2 heads"),
        (FullAttentionSpec(**ATTENTION, state_content_bytes=100), "packs keys and values"),
        (FullAttentionSpec(**ATTENTION, non_causal=True), "attends to later tokens"),
        (FullAttentionSpec(**ATTENTION, dtype=torch.complex64), "complex64"),
        (SlidingWindowSpec(**ATTENTION, sliding_window=1), "a window of 1 tokens"),
        (SlidingWindowSpec(**ATTENTION, sliding_window=64, extra_retained_tokens=3), "keeps 3 tokens before"),
        (ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=1), "chunks of 1 tokens"),
        (MLAAttentionSpec(block_size=64, num_kv_heads=2, head_size=576), "has 2 latents a token"),
        (MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, model_version="deepseek_v4"), "'deepseek_v4'"),
        (
            MLAAttentionSpec(
                block_size=64, num_kv_heads=1, head_size=8, cache_dtype_str="nvfp4_ds_mla", state_content_bytes=352
            ),
            "packs latents as 'nvfp4_ds_mla'",
        ),
        (MambaSpec(block_size=8, shapes=((3, 4),), dtypes=(torch.float32,), num_speculative_blocks=1), "accepted yet"),
        (
            MambaSpec(block_size=8, shapes=((3, 4),), dtypes=(torch.float32,), mamba_type=Mechanism.CUSTOM),
            "kind CUSTOM",
        ),
        (MambaSpec(block_size=8, shapes=((3, 4),), dtypes=(torch.float32,)), "without a recurrent one"),
        (MambaSpec(block_size=8, shapes=((3, 97), (4, 8, 16)), dtypes=(torch.float32,) * 2), "97 channels"),
        (
            MambaSpec(block_size=8, shapes=((3, 96), (4, 8, 16), (4, 2)), dtypes=(torch.float32,) * 3),
            "has 3 state tensors",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_mapped_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        of(spec)


def test_groups_that_are_not_to_be_transferred() -> None:
    full = FullAttentionSpec(**ATTENTION)
    with pytest.raises(UnsupportedModelError, match="draft model"):
        engine_groups([Group(layer_names=["layers.0"], kv_cache_spec=full, is_eagle_group=True)], ModelFacts())
    with pytest.raises(UnsupportedModelError, match="not to be transferred"):
        engine_groups([Group(layer_names=["layers.0"], kv_cache_spec=full, enable_kv_transfer=False)], ModelFacts())


def test_layer_numbers() -> None:
    assert layer_number("model.layers.17.self_attn.attn") == 17
    for wrong in ("model.embed", "model.blocks.0.layers.3.attn"):
        with pytest.raises(SpecError, match="numbers in it"):
            layer_number(wrong)


# Layouts


def test_a_layout_is_the_backends() -> None:
    assert key_value_layout("FLASH_ATTN") is KeyValueLayout.CONTENT
    assert key_value_layout("CPU_ATTN", "vec") is KeyValueLayout.CPU
    for backend, instructions in (("CPU_ATTN", "amx"), ("CPU_ATTN", ""), ("ROCM_ATTN", ""), ("FLEX_ATTENTION", "")):
        with pytest.raises(UnsupportedModelError, match=r"form of its own|lays keys and values out"):
            key_value_layout(backend, instructions)

    def module(backend: str, **attributes: Any) -> Any:
        return SimpleNamespace(
            get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), head_size=64, **attributes
        )

    modules = {"a": module("CPU_ATTN", isa="vec16"), "b": module("FLASH_ATTN_MLA"), "c": SimpleNamespace()}
    assert layouts_of(["a", "b", "c"], modules) == {"a": KeyValueLayout.CPU}


def test_keys_as_wide_as_values_on_cpus() -> None:
    spec = FullAttentionSpec(**{**ATTENTION, "head_size_v": 32})
    with pytest.raises(UnsupportedModelError, match="as wide as values"):
        of(spec, layouts={"model.layers.3.attn": KeyValueLayout.CPU})


def test_quantized_caches_have_a_name() -> None:
    assert cache_numerics("auto") == {}
    assert cache_numerics("fp8") == cache_numerics("fp8_e4m3") != cache_numerics("fp8_e5m2")
    with pytest.raises(UnsupportedModelError, match="calculate_kv_scales"):
        cache_numerics("fp8", computes_scales=True)
