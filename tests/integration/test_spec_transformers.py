"""Specs against the caches that transformers really fills."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.errors import UnsupportedModelError  # noqa: E402
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec  # noqa: E402
from kvstore.spec.families import FAMILIES, FAMILY_OF, REFUSED  # noqa: E402
from tests.models.tiny import TINY, VOCABULARY, build_tiny, cache_argument, tiny_config  # noqa: E402

PROMPT_TOKENS = 40
DTYPES = ("float32", "bfloat16")
SMALL = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
"""Fields of some attention models; a model ignores those that it does not have."""
WINDOWED = {**SMALL, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}
CHUNKED = {**SMALL, "attention_chunk_size": 16}
ATTENTION_MODELS = [
    (model_type, fields)
    for family, fields in zip(FAMILIES[:3], (SMALL, WINDOWED, CHUNKED), strict=True)
    for model_type in sorted(family.model_types - {make().model_type for make in TINY.values()})
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompt(tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(5))


def run(model: Any, ids: torch.Tensor, *ends: int, damage: str = "") -> tuple[Any, torch.Tensor]:
    """The cache of `ids` and the logits of the last token, computed in chunks that end at `ends`.

    The kind of tensor named by `damage` is zeroed before each chunk.
    """
    cache = transformers.DynamicCache(config=model.config)
    start = 0
    with torch.inference_mode():
        for end in (*ends, ids.shape[1]):
            for layer in cache.layers if damage else ():
                stored = vars(layer).get(damage, vars(layer).get(f"{damage}_states"))
                for tensor in stored.values() if isinstance(stored, dict) else [stored]:
                    if tensor is not None:
                        tensor.zero_()
            arguments = {cache_argument(model.config): cache, "use_cache": True}
            if model.config.model_type != "mamba2":
                arguments["position_ids"] = torch.arange(start, end)[None]
            logits = model(input_ids=ids[:, start:end], **arguments).logits
            start = end
    return cache, logits[0, -1].float()


def tensors_in(cache: Any) -> dict[tuple[int, str], tuple[tuple[int, ...], str]]:
    """Shape (without the batch) and type of every tensor that a cache holds, by layer and name."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for number, layer in enumerate(cache.layers):
        for attribute, value in vars(layer).items():
            if torch.is_tensor(value) and attribute != "_sliding_window_tensor":
                found[number, attribute] = value
            elif isinstance(value, dict):
                states = {index: state for index, state in value.items() if torch.is_tensor(state)}
                name = attribute.removesuffix("_states")
                for index, state in states.items():
                    found[number, name if len(value) == 1 else f"{name}_{index}"] = state
    return {
        slot: (tuple(value.shape[1:]), str(value.dtype).removeprefix("torch."))
        for slot, value in found.items()
        if value.numel()
    }


def tensors_of(spec: ModelSpec, tokens: int) -> dict[tuple[int, str], tuple[tuple[int, ...], str]]:
    expected = {}
    for group in spec.groups:
        valid = tokens if group.rule is ReuseRule.ATTENTION else group.valid_tokens(spec.block_tokens, tokens)
        for layer in group.layers:
            for tensor in group.tensors:
                expected[layer, tensor.name] = (tensor.shape(tensor.rows, valid), tensor.dtype.label)
    return expected


def spec_of(config: Any, dtype: Any = None) -> ModelSpec:
    return ModelSpec.from_transformers(config, weights="random", block_tokens=16, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_the_spec_names_every_tensor_of_the_real_cache(name: str, dtype: str) -> None:
    model = build_tiny(name, dtype=dtype)
    spec = spec_of(model.config)
    for tokens in (1, 15, PROMPT_TOKENS):
        cache, _ = run(model, prompt(tokens))
        assert tensors_in(cache) == tensors_of(spec, tokens)
    # A step of decoding writes some states in place: shapes and types must stay.
    cache, _ = run(model, prompt(PROMPT_TOKENS), PROMPT_TOKENS - 1)
    assert tensors_in(cache) == tensors_of(spec, PROMPT_TOKENS)


@pytest.mark.parametrize("name", TINY)
def test_continuing_from_a_cache_is_sound(name: str) -> None:
    model = build_tiny(name)
    _, whole = run(model, prompt())
    _, chunked = run(model, prompt(), 7, 24)
    assert torch.allclose(whole, chunked, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_of_a_tiny_models_cache_counts(name: str) -> None:
    """Tests that compare logits are worth something only if the loss of any kind of tensor shows in them."""
    model = build_tiny(name)
    _, whole = run(model, prompt(), 36)
    for kind in {tensor.name for group in spec_of(model.config).groups for tensor in group.tensors}:
        _, damaged = run(model, prompt(), 36, damage=kind)
        assert (damaged - whole).abs().max() > 0.05 * whole.std(), kind


@pytest.mark.parametrize(("model_type", "fields"), ATTENTION_MODELS)
def test_every_attention_model_type(model_type: str, fields: dict[str, Any]) -> None:
    model = build_tiny(tiny_config(model_type, **fields))
    spec = spec_of(model.config)
    cache, whole = run(model, prompt())
    assert tensors_in(cache) == tensors_of(spec, PROMPT_TOKENS)
    assert any(group.window_tokens for group in spec.groups) == (fields is not SMALL)
    _, chunked = run(model, prompt(), 7, 24)
    assert torch.allclose(whole, chunked, atol=2e-3, rtol=2e-3)


def test_every_known_model_type_is_tested() -> None:
    tested = {make().model_type for make in TINY.values()} | {model_type for model_type, _ in ATTENTION_MODELS}
    assert set(FAMILY_OF) == tested
    assert not set(FAMILY_OF) & set(REFUSED)


@pytest.mark.parametrize("model_type", sorted(FAMILIES[0].model_types))
def test_a_window_that_the_model_does_not_know_is_refused(model_type: str) -> None:
    config = tiny_config(model_type, **SMALL, sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="layer 0 is of type 'sliding_attention'"):
        spec_of(config, "float32")


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "gemma4", "bamba", "nemotron_h", "kimi_linear", "falcon_h1"])
def test_fingerprint_survives_building_and_saving(name: str, tmp_path: Any) -> None:
    config = TINY[name]()
    before = spec_of(config, "float32").fingerprint
    model = build_tiny(name)
    assert spec_of(model.config).fingerprint == before
    model.config.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert spec_of(saved).fingerprint == before
    assert spec_of(model.config, "bfloat16").fingerprint != before


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3", "deepseek_v3"])
def test_another_rope_base_is_another_model(name: str) -> None:
    one, two = TINY[name](), TINY[name]()
    assert spec_of(one, "float32").fingerprint == spec_of(two, "float32").fingerprint
    rope = two.rope_parameters.get("full_attention", two.rope_parameters)
    rope["rope_theta"] = rope["rope_theta"] * 2
    assert spec_of(one, "float32").fingerprint != spec_of(two, "float32").fingerprint


@pytest.mark.parametrize(("composite", "text"), [("qwen3_5", "qwen3_5"), ("gemma3", "gemma3")])
def test_of_a_composite_configuration_the_text_model_counts(composite: str, text: str) -> None:
    text_config = TINY[text]()
    whole = transformers.AutoConfig.for_model(composite, text_config=text_config.to_dict())
    assert whole.model_type != text_config.model_type
    assert spec_of(whole, "bfloat16") == spec_of(text_config, "bfloat16")


def test_the_type_of_a_composite_configuration_is_the_fallback() -> None:
    whole = transformers.AutoConfig.for_model("qwen3_5", text_config=TINY["qwen3_5"]().to_dict(), dtype="bfloat16")
    whole.text_config.dtype = None
    assert spec_of(whole).groups[0].tensors[0].dtype is DType.BFLOAT16


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_model_types_exist_and_give_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=model_type) as caught:
        spec_of(transformers.AutoConfig.for_model(model_type), "float32")
    assert REFUSED[model_type] in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("jamba", {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2}),
        ("mamba", {"num_hidden_layers": 2, "state_size": 16}),
        ("falcon_mamba", {"num_hidden_layers": 2, "state_size": 16}),
    ],
)
def test_the_reason_for_refusing_mamba_1_still_holds(model_type: str, fields: dict[str, Any]) -> None:
    """If this fails, transformers has learnt to continue these models, and they may be supported."""
    model = build_tiny(tiny_config(model_type, use_mamba_kernels=False, **fields))
    ids = prompt()
    past = {"past_key_values": None, "cache_params": None}
    del past["past_key_values" if model_type != "jamba" else "cache_params"]
    (argument,) = past
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0, -1]
        for start, end in ((0, 24), (24, PROMPT_TOKENS)):
            chunked = model(input_ids=ids[:, start:end], use_cache=True, **{argument: cache}).logits[0, -1]
    assert not torch.allclose(whole, chunked, atol=1e-2, rtol=1e-2)


def test_encoder_decoders_and_unknown_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        spec_of(transformers.AutoConfig.for_model("t5"), "float32")
    with pytest.raises(UnsupportedModelError, match=r"'zaya' is not known.*by hand"):
        spec_of(transformers.AutoConfig.for_model("zaya"), "float32")
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        spec_of(transformers.AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True), "float32")


def compressed_convolutional_spec(
    *, layers: int, heads: int, kv_heads: int, head_dim: int, kernel: int, dtype: DType
) -> ModelSpec:
    """Compressed convolutional attention (CCA and CCGQA, arXiv:2510.04476), written by hand as a user would.

    Keys and values have the compressed width. The two convolutions over queries and keys keep their
    last inputs, and half of the value channels come from the token before.
    """
    kv_segment = (Segment("heads", kv_heads, 1),)
    attention = CacheGroup(
        "attention",
        ReuseRule.ATTENTION,
        tuple(range(layers)),
        (
            TensorSpec("keys", dtype, kv_segment, (head_dim,), has_tokens=True),
            TensorSpec("values", dtype, kv_segment, (head_dim,), has_tokens=True),
        ),
    )
    state = CacheGroup(
        "state",
        ReuseRule.STATE,
        tuple(range(layers)),
        (
            TensorSpec(
                "conv",
                dtype,
                (Segment("query", heads, head_dim), Segment("key", kv_heads, head_dim)),
                (kernel,),
                has_tokens=False,
            ),
            TensorSpec(
                "recurrent",
                dtype,
                (Segment("delayed_value", 1, kv_heads * head_dim // 2, replicated=True),),
                (),
                has_tokens=False,
            ),
        ),
    )
    return ModelSpec("zaya", "random", 16, (attention, state))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hand_written_spec_for_compressed_convolutional_attention(dtype: str, kv_heads: int) -> None:
    config = tiny_config(
        "zaya",
        num_hidden_layers=2,
        num_key_value_heads=kv_heads,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        router_hidden_size=16,
    )
    model = build_tiny(config, dtype=dtype)
    spec = compressed_convolutional_spec(
        layers=2, heads=4, kv_heads=kv_heads, head_dim=8, kernel=2, dtype=DType.parse(dtype)
    )
    for tokens in (1, PROMPT_TOKENS):
        cache, _ = run(model, prompt(tokens))
        assert tensors_in(cache) == tensors_of(spec, tokens)
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", TINY)
def test_specs_survive_json(name: str) -> None:
    spec = spec_of(TINY[name](), "bfloat16")
    assert ModelSpec.from_json(spec.to_json()).fingerprint == spec.fingerprint
