"""vLLM's cache groups as values of the mapping layer. Imports neither vLLM nor torch: it reads its specs' attributes.

A spec of vLLM describes what one tensor-parallel rank holds; the groups made of it describe what all of them hold
together. What cannot be mapped is refused by name, never guessed. Read in vLLM 0.32: `v1/kv_cache_interface.py`,
`model_executor/layers/mamba/mamba_utils.py`, and the attention backends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvstore.adapters.paged.groups import EngineGroup, EngineTensor, layer_number
from kvstore.adapters.vllm.facts import KeyValueLayout, ModelFacts
from kvstore.adapters.vllm.states import state_group
from kvstore.errors import UnsupportedModelError
from kvstore.spec import DType, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NULL_PAGE = 0
"""The page that vLLM's tables name where there is none."""

REFUSED = {
    "CircularBufferSpec": "a ring of tokens that are being compressed is of one request only",
    "CrossAttentionSpec": "cross-attention depends on the encoder's input, not on the tokens before",
    "EncoderOnlyAttentionSpec": "an encoder keeps no cache",
    "HiSparseHotSpec": "a hot cache is of one request only",
    "HiSparseResidentSpec": "resident pages are copies of others",
    "HiddenStateCacheSpec": "hidden states are no cache that a request goes on from",
    "RSWASpec": "a window of generated tokens behind a prompt has pages that no prefix names",
    "SinkFullAttentionSpec": "its sink tokens lie in pages before the prompt's",
}
_PLAIN_QUANTIZATION = {"NONE", "FP8_PER_TENSOR"}


def engine_groups(groups: Sequence[Any], facts: ModelFacts) -> tuple[EngineGroup, ...]:
    """The cache groups of vLLM, `KVCacheConfig.kv_cache_groups`, for the mapping layer.

    Args:
        groups: with `layer_names` and `kv_cache_spec`, in the order of the tables.

    Raises:
        UnsupportedModelError: a group cannot be cached, and why.
        SpecError: a layer's name has no number.
    """
    found: list[EngineGroup] = []
    for index, group in enumerate(groups):
        if not getattr(group, "enable_kv_transfer", True):
            raise UnsupportedModelError(f"cache group {index} of vLLM is a copy that is not to be transferred")
        if getattr(group, "is_eagle_group", False):
            raise UnsupportedModelError(
                f"cache group {index} of vLLM is of a draft model; run without speculative decoding"
            )
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        described: list[EngineGroup] = []
        for name in group.layer_names:
            spec = group.kv_cache_spec if specs is None else specs[name]
            described.append(_one_layer(index, name, spec, facts))
        found.extend(_joined(described))
    return tuple(found)


def cache_numerics(cache_dtype: str, *, computes_scales: bool = False) -> dict[str, str]:
    """Facts for `ModelSpec.numerics`: how vLLM quantizes keys and values.

    Args:
        cache_dtype: vLLM's setting.
        computes_scales: whether its first forward pass sets the scales.

    Raises:
        UnsupportedModelError: the scales would be others in every process.
    """
    if cache_dtype.startswith("fp8") and computes_scales:
        raise UnsupportedModelError(
            "calculate_kv_scales has every process quantize with scales of its own; take those of the checkpoint"
        )
    # `fp8` is another name of `fp8_e4m3`.
    return {} if cache_dtype == "auto" else {"vllm.cache_dtype": {"fp8": "fp8_e4m3"}.get(cache_dtype, cache_dtype)}


def _one_layer(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    kind = type(spec).__name__
    if kind in REFUSED:
        raise UnsupportedModelError(f"layer {name!r} of vLLM is of kind {kind}: {REFUSED[kind]}")
    build = BUILDERS.get(kind)
    if build is None:
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM is of kind {kind}, which is not known; known are {', '.join(sorted(BUILDERS))}"
        )
    return build(index, name, spec, facts)


def _joined(layers: Sequence[EngineGroup]) -> list[EngineGroup]:
    """Layers that differ in nothing but number and name, as one group."""
    alike: dict[EngineGroup, list[EngineGroup]] = {}
    for layer in layers:
        alike.setdefault(replace(layer, layers=(0,), names=("",)), []).append(layer)
    joined = []
    for form, members in alike.items():
        members.sort(key=lambda member: member.layers)
        joined.append(
            replace(
                form,
                layers=tuple(member.layers[0] for member in members),
                names=tuple(member.names[0] for member in members),
            )
        )
    return joined


# Attention


def _full(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    if getattr(spec, "non_causal", False):
        raise UnsupportedModelError(f"layer {name!r} of vLLM attends to later tokens, so no prefix has a cache")
    return _attention(index, name, spec, _key_values(name, spec, facts))


def _latent(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    if getattr(spec, "non_causal", False):
        raise UnsupportedModelError(f"layer {name!r} of vLLM attends to later tokens, so no prefix has a cache")
    return _attention(index, name, spec, _latents(name, spec))


def _window(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    return _attention(index, name, spec, _key_values(name, spec, facts), window=_window_size(name, spec))


def _latent_window(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    if getattr(spec, "bounded_replay", False):
        raise UnsupportedModelError(f"layer {name!r} of vLLM computes its window again and caches none")
    return _attention(index, name, spec, _latents(name, spec), window=_window_size(name, spec))


def _chunks(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    chunk = int(spec.attention_chunk_size)
    if chunk < 2:
        raise UnsupportedModelError(f"layer {name!r} of vLLM attends to chunks of {chunk} tokens; nothing is cached")
    return _attention(index, name, spec, _key_values(name, spec, facts), window=chunk, chunk=chunk)


def _window_size(name: str, spec: Any) -> int:
    window = int(spec.sliding_window)
    if window < 2:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has a window of {window} tokens; nothing is cached")
    if getattr(spec, "extra_retained_tokens", 0):
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM keeps {spec.extra_retained_tokens} tokens before its window for speculative "
            "decoding; run without it"
        )
    return window


def _attention(
    index: int,
    name: str,
    spec: Any,
    tensors: tuple[EngineTensor, ...],
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> EngineGroup:
    mode = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    if mode not in _PLAIN_QUANTIZATION:
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM quantizes its cache by {mode}, which keeps scales beside or packs tokens; use "
            "kv_cache_dtype auto, fp8_e4m3 or fp8_e5m2"
        )
    if getattr(spec, "tokens_per_state", 1) != 1:
        raise UnsupportedModelError(f"layer {name!r} of vLLM stores {spec.tokens_per_state} tokens in one entry")
    if getattr(spec, "num_head_slots", None) not in (None, spec.num_kv_heads):
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {spec.num_head_slots} slots for {spec.num_kv_heads} heads, an order of its "
            "backend's own; choose another attention_backend"
        )
    return EngineGroup(
        index=index,
        rule=ReuseRule.ATTENTION if window is None else ReuseRule.STATE,
        layers=(layer_number(name),),
        names=(name,),
        tensors=tensors,
        page_tokens=int(spec.block_size),
        window_tokens=None if window is None else window - 1,
        chunk_tokens=chunk,
    )


def _key_values(name: str, spec: Any, facts: ModelFacts) -> tuple[EngineTensor, ...]:
    if getattr(spec, "state_content_bytes", None) is not None:
        raise UnsupportedModelError(f"layer {name!r} of vLLM packs keys and values in a form of its backend's own")
    dtype = DType.parse(spec.dtype)
    heads = (Segment("heads", _total_heads(name, spec, facts), 1),)
    key_dim, value_dim = int(spec.head_size), int(spec.head_size_v)
    keys = TensorSpec("keys", dtype, heads, (key_dim,), has_tokens=True)
    values = TensorSpec("values", dtype, heads, (value_dim,), has_tokens=True)
    layout = KeyValueLayout.CONTENT if facts.layouts is None else facts.layouts.get(name)
    if layout is None:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has an attention backend whose layout is not known")
    if layout is KeyValueLayout.CPU:
        if key_dim != value_dim:
            raise UnsupportedModelError(f"layer {name!r}: vLLM's attention for CPUs needs keys as wide as values")
        return (
            EngineTensor(keys, "page row inner token", split=(0, 2)),
            EngineTensor(values, "page row token inner", split=(1, 2)),
        )
    return (
        EngineTensor(keys, "page row token inner", first=0),
        EngineTensor(values, "page row token inner", first=key_dim),
    )


def _latents(name: str, spec: Any) -> tuple[EngineTensor, ...]:
    """The latent and the rotated part of the key lie in one entry for each token, which every rank holds."""
    if int(spec.num_kv_heads) != 1:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has {spec.num_kv_heads} latents a token; one is known")
    if getattr(getattr(spec, "cache_role", None), "value", "sparse") != "sparse":
        raise UnsupportedModelError(f"layer {name!r} of vLLM is an indexer, whose pages keep scales behind the tokens")
    if getattr(spec, "model_version", None) is not None or getattr(spec, "alignment", None) is not None:
        raise UnsupportedModelError(f"layer {name!r} of vLLM packs latents in the form of {spec.model_version!r}")
    segment = (Segment("latent", 1, 1, replicated=True),)
    packed = getattr(spec, "state_content_bytes", None)
    if packed is not None:
        if getattr(spec, "cache_dtype_str", None) != "fp8_ds_mla":
            raise UnsupportedModelError(f"layer {name!r} of vLLM packs latents as {spec.cache_dtype_str!r}")
        latent = TensorSpec("latent", DType.UINT8, segment, (int(packed),), has_tokens=True)
    else:
        latent = TensorSpec("latent", DType.parse(spec.dtype), segment, (int(spec.head_size),), has_tokens=True)
    return (EngineTensor(latent, "page row token inner", first=0),)


def _total_heads(name: str, spec: Any, facts: ModelFacts) -> int:
    """Heads of the whole model, from those of a rank: few heads are on several ranks."""
    own = int(spec.num_kv_heads)
    if facts.ranks == 1:
        return own
    shards = getattr(spec, "max_tp_shards", None)
    if shards is not None:
        return own * min(facts.ranks, int(shards))
    given = facts.kv_heads
    total = given if given is None or isinstance(given, int) else given.get(layer_number(name))
    if total is None:
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {own} heads on each of {facts.ranks} ranks; of how many"
        )
    if max(1, total // facts.ranks) != own or (total % facts.ranks and facts.ranks % total):
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {own} heads on each of {facts.ranks} ranks, which are not {total} together"
        )
    return total


BUILDERS: dict[str, Callable[[int, str, Any, ModelFacts], EngineGroup]] = {
    "ChunkedLocalAttentionSpec": _chunks,
    "FullAttentionSpec": _full,
    "MLAAttentionSpec": _latent,
    "MambaSpec": state_group,
    "SlidingWindowMLASpec": _latent_window,
    "SlidingWindowSpec": _window,
}
