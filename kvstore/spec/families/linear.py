"""Recurrent mechanisms: gated delta rule, Kimi delta attention, Mamba-2, and the short convolution.

Convolution states are `[channels, kernel]` in the type of the activations, recurrent states are
float32 whatever the model's type is, as `transformers` keeps them (each function names the source).
"""

from __future__ import annotations

from math import gcd
from typing import Any

from kvstore.spec.dtypes import DType
from kvstore.spec.families.mechanism import Mechanism, MechanismBuilder, read_count
from kvstore.spec.group import ReuseRule
from kvstore.spec.shard import Segment
from kvstore.spec.tensor import TensorSpec

SHORT_CONV_UNITS = 16
"""A depthwise convolution may be split between any two channels; more parts than this only add pieces."""


def gated_delta(config: Any, dtype: DType) -> Mechanism:
    """Gated delta rule (arXiv:2412.06464) as in Qwen3-Next, Qwen3.5 and OLMo hybrid.

    `conv` is query, key and value channels one after the other, each split by its own heads;
    `recurrent` is `[value heads, key dim, value dim]`. The recurrence is computed in float32 by
    `torch_chunk_gated_delta_rule` in `models/qwen3_next/modeling_qwen3_next.py`.
    """
    key_heads, key_dim = read_count(config, "linear_num_key_heads"), read_count(config, "linear_key_head_dim")
    value_heads, value_dim = read_count(config, "linear_num_value_heads"), read_count(config, "linear_value_head_dim")
    conv = (
        Segment("query", units=key_heads, unit_rows=key_dim),
        Segment("key", units=key_heads, unit_rows=key_dim),
        Segment("value", units=value_heads, unit_rows=value_dim),
    )
    kernel = read_count(config, "linear_conv_kernel_dim")
    return _state(
        TensorSpec("conv", dtype, conv, (kernel,), has_tokens=False),
        _recurrent(value_heads, (key_dim, value_dim)),
    )


def kimi_delta(config: Any, dtype: DType) -> Mechanism:
    """Kimi delta attention (arXiv:2510.26692): as the gated delta rule, with one number of heads.

    `KimiLinearDeltaAttention.forward` in `models/kimi_linear/modeling_kimi_linear.py` casts the state
    to float32 before it is cached.
    """
    heads, dim = read_count(config, "linear_num_heads"), read_count(config, "linear_head_dim")
    conv = tuple(Segment(name, units=heads, unit_rows=dim) for name in ("query", "key", "value"))
    kernel = read_count(config, "linear_conv_kernel_dim")
    return _state(
        TensorSpec("conv", dtype, conv, (kernel,), has_tokens=False),
        _recurrent(heads, (dim, dim)),
    )


def mamba2(*, heads: str, head_dim: str, state: str, groups: str, kernel: str) -> MechanismBuilder:
    """A builder for Mamba-2 (arXiv:2405.21060), given the names of a family's configuration fields.

    `conv` is the channels of x by heads, then B and C by groups; a single group is needed by every
    head, so it replicates. `recurrent` is `[heads, head dim, state]`; `mamba2_chunk_scan` in
    `models/mamba2/modeling_mamba2.py` and its copies compute and return it in float32.
    """

    def build(config: Any, dtype: DType) -> Mechanism:
        head_count, rows = read_count(config, heads), read_count(config, head_dim)
        group_count, state_size = read_count(config, groups), read_count(config, state)
        conv = (
            Segment("x", units=head_count, unit_rows=rows),
            Segment("B", units=group_count, unit_rows=state_size, replicated=group_count == 1),
            Segment("C", units=group_count, unit_rows=state_size, replicated=group_count == 1),
        )
        return _state(
            TensorSpec("conv", dtype, conv, (read_count(config, kernel),), has_tokens=False),
            _recurrent(head_count, (rows, state_size)),
        )

    return build


def short_convolution(config: Any, dtype: DType) -> Mechanism:
    """The gated short convolution of LFM2 (`models/lfm2/modeling_lfm2.py`): `conv` and nothing else."""
    channels = read_count(config, "hidden_size")
    units = gcd(channels, SHORT_CONV_UNITS)
    segment = Segment("channels", units=units, unit_rows=channels // units)
    return _state(TensorSpec("conv", dtype, (segment,), (read_count(config, "conv_L_cache"),), has_tokens=False))


def _recurrent(heads: int, inner: tuple[int, int]) -> TensorSpec:
    return TensorSpec("recurrent", DType.FLOAT32, (Segment("heads", heads, 1),), inner, has_tokens=False)


def _state(*tensors: TensorSpec) -> Mechanism:
    return Mechanism("state", ReuseRule.STATE, tensors)
