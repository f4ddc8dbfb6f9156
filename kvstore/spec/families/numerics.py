"""A digest of those configuration facts that change the bytes of a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvstore.errors import UnsupportedModelError

# Everything is hashed but what cannot change keys, values or states: a field too many costs a miss
# after an upgrade, a field too few costs wrong text.
IGNORED_FIELDS = frozenset(
    {
        # Where it came from, what it is called
        "architectures", "auto_map", "custom_pipelines", "finetuning_task", "model_name", "name_or_path",
        "task_specific_params", "tokenizer_class", "transformers_version", "transformers_weights",
        # Types: they are in the tensors of the spec
        "dtype", "torch_dtype",
        # What a forward pass returns, and how it is scheduled
        "attn_implementation", "chunk_size_feed_forward", "experts_implementation", "num_logits_to_keep",
        "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache",
        "use_mamba_kernels",
        # Training and classification heads
        "id2label", "initializer_range", "label2id", "num_labels", "problem_type", "rescale_prenorm_residual",
        "router_aux_loss_coef", "z_loss_coefficient",
        # Token ids with a meaning
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    }
)  # fmt: skip
IGNORED_SUFFIXES = ("dropout",)


def numerics_digest(config: Any) -> str:
    """SHA-256, in hex, of the canonical form of a configuration; equal on every machine.

    Canonical: a JSON object with sorted keys, without private and ignored fields and fields that are
    None; tuples are lists and whole floats integers, so that a configuration read back from its JSON
    file has the same digest.

    Raises:
        UnsupportedModelError: a field holds something that has no canonical form.
    """
    canonical = _canonical(_fields(config), "config")
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fields(config: Any) -> Mapping[str, Any]:
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    if getattr(config, "layer_types", None) is not None:
        # Some configurations compute it from other fields and leave it out of their dictionary.
        fields = {**fields, "layer_types": config.layer_types}
    return fields


def _canonical(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {
            str(name): _canonical(member, f"{path}.{name}")
            for name, member in value.items()
            if member is not None and not _ignored(str(name))
        }
    if isinstance(value, list | tuple):
        return [_canonical(member, f"{path}[{index}]") for index, member in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((_canonical(member, path) for member in value), key=repr)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    if hasattr(value, "to_dict"):
        return _canonical(value.to_dict(), path)
    raise UnsupportedModelError(
        f"{path} is a {type(value).__name__}, which has no canonical form to hash; "
        "replace it by numbers, strings, lists or dicts"
    )


def _ignored(name: str) -> bool:
    return name.startswith("_") or name in IGNORED_FIELDS or name.endswith(IGNORED_SUFFIXES)
