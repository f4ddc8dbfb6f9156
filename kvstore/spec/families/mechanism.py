"""What one mechanism of a model's layer keeps in the cache, and how a configuration is read for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from kvstore.errors import UnsupportedModelError
from kvstore.spec.dtypes import DType

if TYPE_CHECKING:
    from kvstore.spec.group import ReuseRule
    from kvstore.spec.tensor import TensorSpec


@dataclass(frozen=True)
class Mechanism:
    """The cache of one mechanism in one layer; layers with equal mechanisms form a group.

    Attributes:
        kind: base of the group's name: `attention`, `window`, `state`.
        rule: when the stored value may be used again.
        tensors: in storage order.
        window_tokens: as in `CacheGroup`.
    """

    kind: str
    rule: ReuseRule
    tensors: tuple[TensorSpec, ...]
    window_tokens: int | None = None


MechanismBuilder: TypeAlias = Callable[[Any, DType], Mechanism]
"""Reads a configuration; the type is that of activations, keys and values."""


def read_count(config: Any, *names: str) -> int:
    """A positive integer of the configuration: the first of `names` that is set.

    Raises:
        UnsupportedModelError: none is set, or it is not a positive integer.
    """
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(
                f"{_model_type(config)}: {name} is {value!r}; a positive integer is needed to lay the cache out"
            )
        return value
    raise UnsupportedModelError(
        f"{_model_type(config)}: the configuration has no {' or '.join(names)}; write the ModelSpec by hand"
    )


def _model_type(config: Any) -> str:
    return f"model type {getattr(config, 'model_type', None)!r}"
