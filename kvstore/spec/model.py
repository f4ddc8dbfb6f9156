"""Model spec: what makes two caches interchangeable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvstore.errors import SpecError
from kvstore.limits import BLOCK_TOKENS_MAX, BLOCK_TOKENS_MIN, GROUPS_MAX, LAYERS_MAX
from kvstore.spec.dtypes import DType
from kvstore.spec.group import CacheGroup, LayerSpan, ReuseRule
from kvstore.spec.shard import WHOLE, Segment
from kvstore.spec.tensor import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.spec.shard import Shard

FINGERPRINT_DOMAIN = b"kvstore.spec.v1\0"


@dataclass(frozen=True)
class ModelSpec:
    """Identity of a model's weights, and the groups, types and storage layout of its cache.

    Two caches with equal `fingerprint` are interchangeable. Tensor- and pipeline-parallel sizes, the
    engine's own layout and codecs are no part of it.

    Attributes:
        model: name of the architecture, for people and for the fingerprint.
        weights: identity of the weights: a digest, a revision, an explicit name. Two different sets of
            weights under one name give silently wrong text, so there is no default.
        block_tokens: tokens per attention block and per step of the prefix keys.
        groups: the cache groups.
        numerics: further facts that change cache bytes (rope scaling, weight quantization ...), as sorted
            name and value pairs.
    """

    model: str
    weights: str
    block_tokens: int
    groups: tuple[CacheGroup, ...]
    numerics: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise SpecError(f"model={self.model!r} is no text; name the architecture")
        if not isinstance(self.weights, str) or not self.weights.strip():
            raise SpecError("weights= needs the identity of the weights (a digest, a revision, an explicit name)")
        if type(self.block_tokens) is not int or not BLOCK_TOKENS_MIN <= self.block_tokens <= BLOCK_TOKENS_MAX:
            raise SpecError(
                f"block_tokens={self.block_tokens!r} is no whole number from {BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}; "
                "64 is usual"
            )
        if not isinstance(self.groups, tuple):
            raise SpecError(f"groups= is a tuple of CacheGroup, not a {type(self.groups).__name__}; write (group,)")
        if not 1 <= len(self.groups) <= GROUPS_MAX:
            raise SpecError(f"a spec has 1 to {GROUPS_MAX} groups, not {len(self.groups)}")
        if len({group.name for group in self.groups}) != len(self.groups):
            raise SpecError("two groups have the same name")
        if not all(isinstance(text, str) for pair in self.numerics for text in pair):
            raise SpecError(f"numerics={self.numerics!r} are pairs of texts; write numbers as text, too")
        names = [name for name, _ in self.numerics]
        if names != sorted(set(names)):
            raise SpecError("numerics must be sorted by name, each name once; build the spec with dict items, sorted")
        if self.layers[-1] >= LAYERS_MAX:
            raise SpecError(f"layer {self.layers[-1]} is past the limit of {LAYERS_MAX} layers")
        seen: set[tuple[int, str]] = set()
        for group in self.groups:
            for layer in group.layers:
                for tensor in group.tensors:
                    if (layer, tensor.name) in seen:
                        raise SpecError(f"layer {layer} has the tensor {tensor.name!r} in two groups")
                    seen.add((layer, tensor.name))
            group.spans(self.block_tokens)

    @classmethod
    def from_transformers(
        cls,
        config: Any,
        *,
        weights: str,
        block_tokens: int = 64,
        dtype: Any = None,
        numerics: Mapping[str, str] | None = None,
    ) -> ModelSpec:
        """The spec of a `transformers` configuration; see `kvstore.spec.from_transformers`."""
        from kvstore.spec.from_transformers import spec_from_transformers

        return spec_from_transformers(
            config, weights=weights, block_tokens=block_tokens, dtype=dtype, numerics=numerics
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Every layer number that some group holds, ascending."""
        return tuple(sorted({layer for group in self.groups for layer in group.layers}))

    @cached_property
    def spans(self) -> tuple[tuple[LayerSpan, ...], ...]:
        """Layer spans of each group, by group index."""
        return tuple(group.spans(self.block_tokens) for group in self.groups)

    @cached_property
    def span_of_layer(self) -> dict[tuple[int, int], int]:
        """Index of the span that holds a layer of a group, by (group, layer)."""
        return {
            (group, layer): span.index
            for group, spans in enumerate(self.spans)
            for span in spans
            for layer in span.layers
        }

    def bytes_by_group(self, tokens: int, shard: Shard = WHOLE) -> dict[str, int]:
        """Bytes of a worker's cache after a prefix of `tokens` tokens, S_kv in the literature, by group name."""
        return {group.name: group.prefix_bytes(tokens, shard) for group in self.groups}

    @cached_property
    def attention_groups(self) -> tuple[int, ...]:
        return tuple(i for i, group in enumerate(self.groups) if group.rule is ReuseRule.ATTENTION)

    @cached_property
    def state_groups(self) -> tuple[int, ...]:
        return tuple(i for i, group in enumerate(self.groups) if group.rule is ReuseRule.STATE)

    def group_index(self, layer: int, tensor: str) -> int:
        """Index of the group that holds `tensor` of `layer`.

        Raises:
            SpecError: no group does.
        """
        index = self._tensor_groups.get((layer, tensor))
        if index is None:
            names = sorted(name for number, name in self._tensor_groups if number == layer)
            if not names:
                raise SpecError(
                    f"layer {layer!r} has no cache in this spec; it has {len(self.layers)} layers, numbers "
                    f"{self.layers[0]} to {self.layers[-1]}"
                )
            raise SpecError(f"layer {layer} has no tensor {tensor!r}; it has {', '.join(names)}")
        return index

    @cached_property
    def _tensor_groups(self) -> dict[tuple[int, str], int]:
        return {
            (layer, tensor.name): index
            for index, group in enumerate(self.groups)
            for layer in group.layers
            for tensor in group.tensors
        }

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 over the canonical JSON form; equal on every machine for equal specs (32 bytes)."""
        return hashlib.sha256(FINGERPRINT_DOMAIN + self.to_json().encode()).digest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. The fingerprint is computed from it."""
        document = {
            "block_tokens": self.block_tokens,
            "groups": [_group_document(group) for group in self.groups],
            "model": self.model,
            "numerics": [list(pair) for pair in self.numerics],
            "weights": self.weights,
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec that `to_json` described.

        Raises:
            SpecError: the text is not a spec.
        """
        try:
            document = json.loads(text)
            return cls(
                model=document["model"],
                weights=document["weights"],
                block_tokens=document["block_tokens"],
                groups=tuple(_group_from_document(group) for group in document["groups"]),
                numerics=tuple((name, value) for name, value in document["numerics"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"this is not a model spec in JSON form: {error}") from error


def _group_document(group: CacheGroup) -> dict[str, Any]:
    return {
        "layers": list(group.layers),
        "name": group.name,
        "rule": group.rule.value,
        "tensors": [
            {
                "dtype": tensor.dtype.label,
                "has_tokens": tensor.has_tokens,
                "inner": list(tensor.inner),
                "name": tensor.name,
                "segments": [[s.name, s.units, s.unit_rows, s.replicated] for s in tensor.segments],
            }
            for tensor in group.tensors
        ],
        "window_tokens": group.window_tokens,
    }


def _group_from_document(document: dict[str, Any]) -> CacheGroup:
    return CacheGroup(
        name=document["name"],
        rule=ReuseRule(document["rule"]),
        layers=tuple(document["layers"]),
        tensors=tuple(
            TensorSpec(
                name=tensor["name"],
                dtype=DType.parse(tensor["dtype"]),
                segments=tuple(Segment(*segment) for segment in tensor["segments"]),
                inner=tuple(tensor["inner"]),
                has_tokens=tensor["has_tokens"],
            )
            for tensor in document["tensors"]
        ),
        window_tokens=document["window_tokens"],
    )
