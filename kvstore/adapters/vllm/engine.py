"""What the connector has to know of vLLM's configuration: read once, checked, as values."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.adapters.paged import CheckpointPolicy, spec_of
from kvstore.adapters.vllm.facts import ModelFacts, layouts_of
from kvstore.adapters.vllm.groups import cache_numerics, engine_groups
from kvstore.adapters.vllm.layered_loading import check_may_be_layered
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.spec import Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.adapters.paged import EngineGroup
    from kvstore.adapters.vllm.config import ConnectorConfig
    from kvstore.spec import ModelSpec

_NO_BYTES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Of a model's configuration: what does not say how its cache is computed, or is said elsewhere."""


@dataclass(frozen=True)
class EngineFacts:
    """What of vLLM's configuration the connector depends on.

    Attributes:
        model: the architecture, `LlamaForCausalLM`.
        numerics: what changes the cache's bytes besides architecture, weights and the form of its tensors.
        shard: this worker's tensor-parallel position; that of the first one in the scheduler.
        groups: the cache groups.
        table_count: vLLM's cache groups, which have a table of pages each.
        alignment_tokens: vLLM's own hits end at multiples of it.
        may_load, may_save: what `kv_role` allows.
        is_async: whether a step is scheduled before the one before it has ended.
        has_microbatches: whether one step's forward of a layer may be several.
    """

    model: str
    numerics: dict[str, str]
    shard: Shard
    groups: tuple[EngineGroup, ...]
    table_count: int
    alignment_tokens: int
    may_load: bool
    may_save: bool
    is_async: bool
    has_microbatches: bool

    @classmethod
    def read(cls, vllm_config: Any, kv_cache_config: Any, *, has_tensors: bool = False) -> EngineFacts:
        """From a `VllmConfig` and a `KVCacheConfig`.

        Args:
            has_tensors: in a worker whose layers have their tensors: then the groups say how these lie.

        Raises:
            UnsupportedModelError: a way to run the model whose pages cannot be mapped to tokens and layers.
            ConfigError: a setting that a cache must not run with.
        """
        _check_parallel(vllm_config.parallel_config)
        _check_drafts(vllm_config)
        transfer = vllm_config.kv_transfer_config
        _check_failure_policy(transfer)
        parallel = vllm_config.parallel_config
        groups = kv_cache_config.kv_cache_groups
        return cls(
            model=_architecture(vllm_config.model_config),
            numerics=_numerics(vllm_config.model_config, vllm_config.cache_config),
            shard=Shard(int(parallel.rank) % int(parallel.tensor_parallel_size), int(parallel.tensor_parallel_size)),
            groups=engine_groups(groups, _model_facts(vllm_config, groups, has_tensors=has_tensors)),
            table_count=len(groups),
            alignment_tokens=math.lcm(*(int(group.kv_cache_spec.block_size) for group in groups)),
            may_load=bool(transfer.is_kv_consumer),
            may_save=bool(transfer.is_kv_producer),
            is_async=bool(vllm_config.scheduler_config.async_scheduling),
            has_microbatches=bool(getattr(parallel, "use_ubatching", False)),
        )

    def check(self, config: ConnectorConfig) -> None:
        """Whether the connector may be run with these settings.

        Raises:
            ConfigError: not with this engine.
        """
        if self.has_microbatches and (config.saves_by_layer or config.loads_by_layer):
            raise ConfigError(
                "vLLM runs microbatches (enable_dbo, ubatch_size): a layer's forward is then several, and its end is "
                "told for each. Leave them out, or saves_by_layer and load = 'layered'"
            )
        if not config.loads_by_layer:
            return
        check_may_be_layered(self.groups, self.table_count)
        if self.is_async:
            raise ConfigError(
                "load = 'layered' with asynchronous scheduling: when a load fails, vLLM has scheduled the next step "
                "already, and takes what that computes for good. Start with --no-async-scheduling, or leave it out"
            )

    def spec(self, config: ConnectorConfig) -> ModelSpec:
        """What the store is opened with.

        Raises:
            SpecError: as `spec_of`.
        """
        return spec_of(
            self.groups,
            model=config.model or self.model,
            weights=config.weights,
            block_tokens=config.block_tokens,
            numerics=self.numerics,
        )

    def policy(self, block_tokens: int) -> CheckpointPolicy:
        """At which lengths resume points are kept in a store with blocks of so many tokens."""
        return CheckpointPolicy(
            self.alignment_tokens,
            has_states=any(group.is_state for group in self.groups),
            has_windows=any(group.is_window for group in self.groups),
            block_tokens=block_tokens,
        )


def _model_facts(vllm_config: Any, groups: Sequence[Any], *, has_tensors: bool) -> ModelFacts:
    model_config = vllm_config.model_config
    text_config = model_config.hf_text_config
    names = [name for group in groups for name in group.layer_names]
    return ModelFacts(
        ranks=int(vllm_config.parallel_config.tensor_parallel_size),
        kv_heads=int(model_config.get_total_num_kv_heads()),
        mamba_groups=next(
            (int(getattr(text_config, name)) for name in ("n_groups", "mamba_n_groups") if hasattr(text_config, name)),
            None,
        ),
        is_channel_first=os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT", "") == "DS",
        layouts=layouts_of(names, vllm_config.compilation_config.static_forward_context) if has_tensors else None,
    )


def _architecture(model_config: Any) -> str:
    names = getattr(model_config.hf_config, "architectures", None) or [type(model_config.hf_config).__name__]
    return "+".join(names)


def _numerics(model_config: Any, cache_config: Any) -> dict[str, str]:
    """As `ModelSpec.numerics`: plain where people want to read them, the rest of the model's settings as one digest."""
    settings = json.loads(model_config.hf_config.to_json_string(use_diff=False))
    for name in _NO_BYTES:
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    numerics = {
        "engine": "vllm",
        "dtype": str(model_config.dtype).removeprefix("torch."),
        **cache_numerics(
            str(cache_config.cache_dtype), computes_scales=bool(getattr(cache_config, "calculate_kv_scales", False))
        ),
        "quantization": str(model_config.quantization or "none"),
        "settings": f"sha256:{digest}",
    }
    if "longrope" in json.dumps(settings.get("rope_parameters") or settings.get("rope_scaling") or {}):
        # vLLM chooses short or long factors for all requests by this.
        numerics["max_model_len"] = str(model_config.max_model_len)
    return numerics


def _check_parallel(parallel: Any) -> None:
    for name, why in (
        ("pipeline_parallel_size", "a worker then holds some of the layers only"),
        ("decode_context_parallel_size", "tokens of one page are then spread over workers"),
        ("prefill_context_parallel_size", "tokens of one page are then spread over workers"),
    ):
        size = int(getattr(parallel, name, 1))
        if size != 1:
            raise UnsupportedModelError(
                f"{name} is {size}, and the kvstore connector cannot map such pages: {why}. Set it to 1"
            )


def _check_drafts(vllm_config: Any) -> None:
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise UnsupportedModelError(
            "speculative decoding is on, and the kvstore connector cannot map its pages: states and windows run ahead "
            "of the tokens that were accepted. Leave speculative_config out"
        )


def _check_failure_policy(transfer: Any) -> None:
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r} (vLLM's default is 'fail'): what a cache "
            "has lost would then be an error of the request. Set it to 'recompute' beside kv_connector"
        )
