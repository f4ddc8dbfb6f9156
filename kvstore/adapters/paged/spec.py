"""The model spec of an engine's cache groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import SpecError
from kvstore.spec import CacheGroup, ModelSpec, ReuseRule, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvstore.adapters.paged.groups import EngineGroup

_Form = tuple[ReuseRule, tuple[TensorSpec, ...], int | None]
_KINDS = ("attention", "window", "state")


def spec_of(
    groups: Sequence[EngineGroup],
    *,
    model: str,
    weights: str,
    block_tokens: int = 64,
    numerics: Mapping[str, str] | None = None,
) -> ModelSpec:
    """The spec of a model as an engine caches it.

    Engine groups of one rule and equal tensors become one group of the spec: how an engine groups its layers, how
    large its pages are and over how many workers it splits are no part of the spec, nor of its fingerprint.

    Args:
        groups: those of all layers of the model, not of one pipeline stage.
        model: name of the architecture.
        weights: identity of the weights.
        block_tokens: tokens per attention block of the store; need not be the engine's.
        numerics: further facts that change cache bytes.

    Raises:
        SpecError: no groups; a layer in two groups with equal tensors; or what `ModelSpec` refuses.
    """
    layers_of = _layers_by_form(groups)
    names = group_names(groups)
    by_form = {_form(group): name for group, name in zip(groups, names, strict=True)}
    ordered = sorted(layers_of, key=lambda form: (_KINDS.index(_kind(form)), layers_of[form]))
    return ModelSpec(
        model=model,
        weights=weights,
        block_tokens=block_tokens,
        groups=tuple(
            CacheGroup(name=by_form[form], rule=form[0], layers=layers_of[form], tensors=form[1], window_tokens=form[2])
            for form in ordered
        ),
        numerics=tuple(sorted((numerics or {}).items())),
    )


def group_names(groups: Sequence[EngineGroup]) -> tuple[str, ...]:
    """The name of the spec's group that each engine group's layers belong to: `attention`, `window_2` ..."""
    layers_of = _layers_by_form(groups)
    names: dict[_Form, str] = {}
    counts: dict[str, int] = {}
    for form in sorted(layers_of, key=lambda form: (_KINDS.index(_kind(form)), layers_of[form])):
        kind = _kind(form)
        number = counts[kind] = counts.get(kind, 0) + 1
        names[form] = kind if number == 1 else f"{kind}_{number}"
    return tuple(names[_form(group)] for group in groups)


def _form(group: EngineGroup) -> _Form:
    return group.rule, tuple(tensor.spec for tensor in group.tensors), group.window_tokens


def _kind(form: _Form) -> str:
    rule, _, window_tokens = form
    if rule is ReuseRule.ATTENTION:
        return "attention"
    return "state" if window_tokens is None else "window"


def _layers_by_form(groups: Sequence[EngineGroup]) -> dict[_Form, tuple[int, ...]]:
    if not groups:
        raise SpecError("the engine has no cache groups; a spec has at least one")
    found: dict[_Form, list[int]] = {}
    for group in groups:
        layers = found.setdefault(_form(group), [])
        twice = set(layers).intersection(group.layers)
        if twice:
            raise SpecError(f"layer {min(twice)} is in two engine groups with equal tensors; name each layer once")
        layers.extend(group.layers)
    return {form: tuple(sorted(layers)) for form, layers in found.items()}
