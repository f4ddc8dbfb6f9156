"""States of vLLM's Mamba layers, and how they split over tensor-parallel ranks, from the shapes that one rank has."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

from kvstore.adapters.paged.groups import EngineGroup, EngineTensor, layer_number
from kvstore.errors import UnsupportedModelError
from kvstore.spec import DType, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.adapters.vllm.facts import ModelFacts

CHANNEL_UNITS = 16
"""A convolution over channels alone may be split between any two; more parts only add pieces."""


def state_group(index: int, name: str, spec: Any, facts: ModelFacts) -> EngineGroup:
    mechanism = spec.mamba_type.name
    if getattr(spec, "num_speculative_blocks", 0):
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM keeps states for tokens that are not accepted yet; turn speculative decoding off"
        )
    build = STATES.get(mechanism)
    if build is None:
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has states of kind {mechanism}, which is not known; known are {', '.join(STATES)}"
        )
    shapes = [tuple(int(size) for size in shape) for shape in spec.shapes]
    dtypes = [DType.parse(dtype) for dtype in spec.dtypes]
    ranks = 1 if getattr(spec, "tp_replicated", False) else facts.ranks
    found = build(name, shapes, ranks, facts)
    if len(found) != len(shapes):
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {len(shapes)} state tensors, {mechanism} is known with {len(found)}; run "
            "without replayed states"
        )
    tensors = []
    offset_bytes = 0
    for (label, segments, inner, axes), shape, dtype in zip(found, shapes, dtypes, strict=True):
        if getattr(spec, "tp_replicated", False):
            rows = sum(segment.rows for segment in segments)
            segments = (Segment("replicated", 1, rows, replicated=True),)
        tensor = TensorSpec(label, dtype, segments, inner, has_tokens=False)
        tensors.append(EngineTensor(tensor, f"page {axes}", offset_bytes=offset_bytes))
        size_bytes = dtype.itemsize
        for size in shape:
            size_bytes *= size
        offset_bytes += size_bytes
    return EngineGroup(
        index=index,
        rule=ReuseRule.STATE,
        layers=(layer_number(name),),
        names=(name,),
        tensors=tuple(tensors),
        page_tokens=int(spec.block_size),
    )


_Shapes = list[tuple[int, ...]]
_Described = tuple[str, tuple[Segment, ...], tuple[int, ...], str]


def _convolution(segments: tuple[Segment, ...], tokens: int, facts: ModelFacts) -> _Described:
    return ("conv", segments, (tokens,), "row inner" if facts.is_channel_first else "inner row")


def _conv_shape(name: str, shapes: _Shapes, facts: ModelFacts) -> tuple[int, int]:
    """Channels of a rank, and tokens, of the first shape."""
    if not shapes or len(shapes[0]) != 2:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has states {shapes}, without a convolution as known")
    tokens, channels = shapes[0]
    return (tokens, channels) if facts.is_channel_first else (channels, tokens)


def _recurrent(name: str, shapes: _Shapes, ranks: int) -> _Described:
    if len(shapes) < 2 or len(shapes[1]) != 3:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has states {shapes}, without a recurrent one as known")
    heads, *inner = shapes[1]
    return ("recurrent", (Segment("heads", heads * ranks, 1),), tuple(inner), "row inner inner")


def _gated_delta(name: str, shapes: _Shapes, ranks: int, facts: ModelFacts) -> list[_Described]:
    """The gated delta rule and Kimi delta attention: channels are query, key, value; states `[heads, value, key]`."""
    recurrent = _recurrent(name, shapes, ranks)
    channels, tokens = _conv_shape(name, shapes, facts)
    heads, value_dim, key_dim = shapes[1]
    key_heads, rest = divmod(channels - heads * value_dim, 2 * key_dim)
    if rest or key_heads < 1:
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {channels} channels, which are not queries and keys of {key_dim} and "
            f"{heads} values of {value_dim}"
        )
    segments = (
        Segment("query", key_heads * ranks, key_dim),
        Segment("key", key_heads * ranks, key_dim),
        Segment("value", heads * ranks, value_dim),
    )
    return [_convolution(segments, tokens, facts), recurrent]


def _mamba2(name: str, shapes: _Shapes, ranks: int, facts: ModelFacts) -> list[_Described]:
    """Mamba-2: channels are x by heads, then B and C by groups; a single group is on every rank."""
    recurrent = _recurrent(name, shapes, ranks)
    channels, tokens = _conv_shape(name, shapes, facts)
    heads, head_dim, state = shapes[1]
    own, rest = divmod(channels - heads * head_dim, 2 * state)
    if rest or own < 1:
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {channels} channels, which are not {heads} heads of {head_dim} and groups of "
            f"{state}"
        )
    total = own if ranks == 1 else facts.mamba_groups
    if total is None:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has {own} groups on each of {ranks} ranks; of how many")
    if total != own * ranks and (total, own) != (1, 1):
        raise UnsupportedModelError(
            f"layer {name!r} of vLLM has {own} groups on each of {ranks} ranks, which are not {total} together"
        )
    segments = (
        Segment("x", heads * ranks, head_dim),
        Segment("B", total, state, replicated=total == 1),
        Segment("C", total, state, replicated=total == 1),
    )
    return [_convolution(segments, tokens, facts), recurrent]


def _mamba1(name: str, shapes: _Shapes, ranks: int, facts: ModelFacts) -> list[_Described]:
    """Mamba: convolution and state by channels."""
    channels, tokens = _conv_shape(name, shapes, facts)
    if len(shapes) < 2 or len(shapes[1]) != 2 or shapes[1][0] != channels:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has states {shapes}, which are not those of Mamba")
    segments = (_channel_segment(name, channels, ranks),)
    return [_convolution(segments, tokens, facts), ("recurrent", segments, (shapes[1][1],), "row inner")]


def _short_convolution(name: str, shapes: _Shapes, ranks: int, facts: ModelFacts) -> list[_Described]:
    channels, tokens = _conv_shape(name, shapes, facts)
    return [_convolution((_channel_segment(name, channels, ranks),), tokens, facts)]


def _linear(name: str, shapes: _Shapes, ranks: int, facts: ModelFacts) -> list[_Described]:
    """Linear attention as in MiniMax: a state for each head, no convolution."""
    return [_recurrent(name, [(), *shapes], ranks)]


def _channel_segment(name: str, channels: int, ranks: int) -> Segment:
    total = channels * ranks
    units = gcd(total, CHANNEL_UNITS)
    if units % ranks:
        raise UnsupportedModelError(f"layer {name!r} of vLLM has {total} channels, which {ranks} ranks do not divide")
    return Segment("channels", units, total // units)


STATES: dict[str, Callable[[str, _Shapes, int, ModelFacts], list[_Described]]] = {
    "GDN_ATTN": _gated_delta,
    "LINEAR": _linear,
    "MAMBA1": _mamba1,
    "MAMBA2": _mamba2,
    "SHORT_CONV": _short_convolution,
}
