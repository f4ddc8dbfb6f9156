"""One engine group's tensors, registered: cut out of what the engine allocated, as the spec's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from kvstore.errors import SpecError
from kvstore.record.rows import local_rows
from kvstore.tiers.gpu.pages import PagedTensor, Pages, state_pages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvstore.adapters.paged.groups import EngineGroup, EngineTensor
    from kvstore.spec import ModelSpec, Shard


@dataclass(frozen=True, eq=False)
class RegisteredGroup:
    """An engine group with its tensors.

    Attributes:
        group: whose.
        name, number: of the spec's group.
        pages: its layers' tensors.
        parts: pages of the tensors that make one page of the tables.
    """

    group: EngineGroup
    name: str
    number: int
    pages: Pages
    parts: int

    def expand(self, page_ids: Sequence[int]) -> list[int]:
        """Pages of the tensors, from pages of a table; -1 stays."""
        if self.parts == 1:
            return list(page_ids)
        return [page * self.parts + part if page >= 0 else -1 for page in page_ids for part in range(self.parts)]


def register_group(
    spec: ModelSpec, group: EngineGroup, name: str, shard: Shard, tensors: Mapping[str, Any], gather: str | None
) -> RegisteredGroup:
    """Register the tensors of a group's layers.

    Raises:
        SpecError: a layer is missing, or lies otherwise than its group says.
    """
    paged: dict[tuple[int, str], PagedTensor] = {}
    sizes: set[int] = set()
    for layer, label in zip(group.layers, group.names, strict=True):
        if label not in tensors:
            raise SpecError(f"the engine registered no tensor of layer {label!r}; it has: {', '.join(tensors)}")
        given = tensors[label]
        parts = list(given) if isinstance(given, (list, tuple)) else [given]
        for tensor in group.tensors:
            rows = _rows(spec, name, tensor, shard)
            view = _view(tensor, parts, rows, label)
            paged[layer, tensor.spec.name] = PagedTensor(view, tensor.axes)
            if tensor.spec.has_tokens:
                sizes.add(int(view.shape[tensor.axes.split().index("token")]))
    pages = Pages(spec, paged, shard=shard, gather=gather)
    page_tokens = sizes.pop() if sizes else group.page_tokens
    if group.page_tokens % page_tokens:
        raise SpecError(
            f"the tensors of engine group {group.index} have pages of {page_tokens} tokens, which do not divide those "
            f"of its table, {group.page_tokens}"
        )
    number = next(at for at, each in enumerate(spec.groups) if each.name == name)
    return RegisteredGroup(group, name, number, pages, group.page_tokens // page_tokens)


def _rows(spec: ModelSpec, name: str, tensor: EngineTensor, shard: Shard) -> int:
    found = next(group for group in spec.groups if group.name == name)
    index = next(number for number, each in enumerate(found.tensors) if each.name == tensor.spec.name)
    return local_rows(found, index, shard)


def _view(tensor: EngineTensor, parts: Sequence[Any], rows: int, label: str) -> Any:
    import torch

    what = f"{tensor.spec.name!r} of layer {label!r}"
    if tensor.part >= len(parts):
        raise SpecError(f"{what} is number {tensor.part} of the layer's tensors; {len(parts)} are registered")
    view = parts[tensor.part]
    dtype = getattr(torch, tensor.spec.dtype.label)
    names = tensor.axes.split()
    if tensor.index is not None:
        view = view[tensor.index]
    if tensor.offset_bytes is not None:
        inner = iter(tensor.spec.inner)
        shape = [rows if axis == "row" else next(inner) for axis in names[1:]]
        return state_pages(view, dtype, shape, tensor.offset_bytes)
    if tensor.split is not None:
        return _typed(_split(tensor, view, what), dtype)
    if view.dim() != len(names):
        raise SpecError(f"{what} has {view.dim()} axes, and {len(names)} are named: {tensor.axes}")
    if tensor.first is not None:
        size = tensor.spec.inner[-1]
        if tensor.first + size > view.shape[-1]:
            raise SpecError(
                f"{what} lies at {tensor.first} to {tensor.first + size} of the last axis, which has {view.shape[-1]}"
            )
        view = view.narrow(-1, tensor.first, size)
    return _typed(view, dtype)


def _split(tensor: EngineTensor, view: Any, what: str) -> Any:
    """One of the equal parts of what each row of a page holds, with axes of its own."""
    assert tensor.split is not None
    number, count = tensor.split
    flat = view.flatten(2)  # a copy if there are gaps
    size, rest = divmod(int(flat.shape[2]), count)
    tokens, odd = divmod(size, prod(tensor.spec.inner))
    if flat.data_ptr() != view.data_ptr():
        raise SpecError(f"{what} lies in rows with gaps; its part of a row cannot be told")
    if rest or odd:
        raise SpecError(f"{what}: rows of {flat.shape[2]} elements are not {count} parts of whole tokens")
    inner = iter(tensor.spec.inner)
    shape = [tokens if axis == "token" else next(inner) for axis in tensor.axes.split()[2:]]
    return flat[:, :, number * size : (number + 1) * size].unflatten(2, shape)


def _typed(view: Any, dtype: Any) -> Any:
    """Engines keep 8-bit floats as plain bytes."""
    if view.dtype != dtype and view.element_size() == dtype.itemsize == 1:
        return view.view(dtype)
    return view
