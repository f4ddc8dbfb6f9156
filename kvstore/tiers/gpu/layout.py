"""How an engine's paged tensors lie: where a page, a row and a token of each tensor of a spec begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import SpecError
from kvstore.limits import PAGES_MAX
from kvstore.record.rows import local_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from kvstore.spec import CacheGroup, ModelSpec, Shard

PAGE, ROW, TOKEN, INNER = "page", "row", "token", "inner"
TOKEN_AXES = (PAGE, ROW, TOKEN)
"""The axes before the inner ones, of a tensor with tokens; without, there is no `token`."""
STATE_AXES = (PAGE, ROW)


@dataclass(frozen=True)
class TensorPages:
    """One tensor of one layer in an engine's memory. Strides count elements of its own type.

    Attributes:
        pages: how many there are.
        rows: of the spec's tensor that this worker holds, such as its heads.
        page_tokens: tokens of one page; 0 where a page holds one whole state.
        inner: sizes of the axes within one row of one token.
        page_stride, row_stride, token_stride: from one to the next; the last is 0 without tokens.
        inner_strides: of each inner axis.
        dtype: name of the element type, as in `DType`.
        device: where it lies: `cpu`, `cuda:0`.
    """

    pages: int
    rows: int
    page_tokens: int
    inner: tuple[int, ...]
    page_stride: int
    row_stride: int
    token_stride: int
    inner_strides: tuple[int, ...]
    dtype: str
    device: str

    @classmethod
    def of(
        cls, shape: Sequence[int], strides: Sequence[int], axes: Sequence[str], dtype: str, device: str, what: str
    ) -> TensorPages:
        """Read shape and strides by the names of their axes.

        Args:
            axes: one name for each axis: `page` and `row` once, `token` at most once, all others `inner`, in the
                order in which the spec's inner axes follow one another.
            what: names the tensor in errors.

        Raises:
            SpecError: axes that are too many, too few, or unknown.
        """
        names = list(axes)
        if len(names) != len(shape):
            raise SpecError(f"{what} has {len(shape)} axes, and {len(names)} are named: {' '.join(names)}")
        unknown = sorted(set(names) - {PAGE, ROW, TOKEN, INNER})
        if unknown or names.count(PAGE) != 1 or names.count(ROW) != 1 or names.count(TOKEN) > 1:
            raise SpecError(
                f"{what} has axes {' '.join(names)!r}; name 'page' and 'row' once each, 'token' once if it has tokens, "
                "and every other one 'inner'"
            )
        at = {name: number for number, name in enumerate(names)}
        token = at.get(TOKEN)
        inner = [number for number, name in enumerate(names) if name == INNER]
        return cls(
            pages=int(shape[at[PAGE]]),
            rows=int(shape[at[ROW]]),
            page_tokens=0 if token is None else int(shape[token]),
            inner=tuple(int(shape[number]) for number in inner),
            page_stride=int(strides[at[PAGE]]),
            row_stride=int(strides[at[ROW]]),
            token_stride=0 if token is None else int(strides[token]),
            inner_strides=tuple(int(strides[number]) for number in inner),
            dtype=dtype,
            device=device,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """In the spec's order: `[pages, rows, page_tokens, *inner]`, or `[pages, rows, *inner]`."""
        tokens = (self.page_tokens,) if self.page_tokens else ()
        return (self.pages, self.rows, *tokens, *self.inner)

    @property
    def places_per_page(self) -> int:
        """Tokens of a page; a state counts as one."""
        return self.page_tokens or 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Of page, row, token and inner axes: everything that must be equal for tensors to be moved by one kernel."""
        return (self.page_stride, self.row_stride, self.token_stride, *self.inner_strides)

    @cached_property
    def inner_run(self) -> int:
        """How many elements of a row of a token follow one another without a gap, from the last axis up."""
        run = 1
        for size, stride in zip(reversed(self.inner), reversed(self.inner_strides), strict=True):
            if size == 1:
                continue
            if stride != run:
                return run
            run *= size
        return run

    @cached_property
    def run_offsets(self) -> npt.NDArray[np.int64]:
        """Where each run of `inner_run` elements begins within a row of a token, in the spec's order of elements."""
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(self.inner, self.inner_strides, strict=True):
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        return offsets[:: self.inner_run]

    @property
    def overlaps(self) -> bool:
        """Whether two elements lie at one place, or an axis runs backwards."""
        sizes = (self.pages, self.rows, self.places_per_page, *self.inner)
        extent = 1
        for stride, size in sorted(zip(self.strides, sizes, strict=True)):
            if size > 1:
                if stride < extent:
                    return True
                extent += stride * (size - 1)
        return False


@dataclass(frozen=True)
class GroupPages:
    """One cache group in an engine's pages.

    Attributes:
        group: its number in the spec.
        pages, page_tokens: as of each of its tensors; a page id names the same page in all of them.
        pool: name of the numbering that its page ids are of.
        layers: those that are registered.
        tensors: by layer and number in the group.
    """

    group: int
    pages: int
    page_tokens: int
    pool: str
    layers: tuple[int, ...]
    tensors: Mapping[tuple[int, int], TensorPages]


@dataclass(frozen=True)
class PageLayout:
    """All registered tensors of a worker, checked against its spec. Immutable; any thread.

    Attributes:
        spec, shard: the model, and the worker whose rows the tensors have.
        groups: by number in the spec; those of which something is registered.
        device: where all of them lie.
    """

    spec: ModelSpec
    shard: Shard
    groups: Mapping[int, GroupPages]
    device: str

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        shard: Shard,
        tensors: Mapping[tuple[int, str], TensorPages],
        pools: Mapping[str, str] | None = None,
    ) -> PageLayout:
        """Check the tensors of an engine against a spec.

        Args:
            tensors: by layer and name. All tensors of a layer's group, or none of them.
            pools: name of the numbering of page ids, by group name; groups that are not named share one.

        Raises:
            SpecError: a tensor is unknown, lacking, of another shape, type or device, or overlaps itself; or those of
                a group disagree in pages.
        """
        if not tensors:
            raise SpecError("no paged tensors were registered; name at least one by (layer, tensor)")
        pools = dict(pools or {})
        unknown = sorted(set(pools) - {group.name for group in spec.groups})
        if unknown:
            raise SpecError(f"pools names {unknown[0]!r}, which is no cache group of the spec")
        found: dict[int, dict[tuple[int, int], TensorPages]] = {}
        for (layer, name), pages in tensors.items():
            number = spec.group_index(layer, name)
            group = spec.groups[number]
            index = next(i for i, tensor in enumerate(group.tensors) if tensor.name == name)
            _check_tensor(group, index, shard, pages, f"{name!r} of layer {layer}")
            found.setdefault(number, {})[layer, index] = pages
        devices = sorted({pages.device for pages in tensors.values()})
        if len(devices) > 1:
            raise SpecError(f"the paged tensors lie on {' and '.join(devices)}; register those of each device apart")
        groups = {
            number: _group_pages(spec, number, members, pools.get(spec.groups[number].name, "pages"))
            for number, members in sorted(found.items())
        }
        return cls(spec, shard, groups, devices[0])

    @property
    def is_whole(self) -> bool:
        """Whether every layer of every group is registered."""
        return len(self.groups) == len(self.spec.groups) and all(
            each.layers == self.spec.groups[number].layers for number, each in self.groups.items()
        )

    @cached_property
    def pool_pages(self) -> dict[str, int]:
        """How many pages each numbering has: its smallest group's."""
        counts: dict[str, int] = {}
        for each in self.groups.values():
            counts[each.pool] = min(counts.get(each.pool, each.pages), each.pages)
        return counts

    def group(self, number: int) -> GroupPages:
        """One group's pages.

        Raises:
            SpecError: nothing of it is registered.
        """
        found = self.groups.get(number)
        if found is None:
            name = self.spec.groups[number].name
            raise SpecError(f"no paged tensors of group {name!r} are registered; register all that are read or written")
        return found


def _check_tensor(group: CacheGroup, index: int, shard: Shard, pages: TensorPages, what: str) -> None:
    tensor = group.tensors[index]
    if pages.dtype != tensor.dtype.label:
        raise SpecError(f"{what} has type {pages.dtype}, the spec says {tensor.dtype.label}; register it as that type")
    if bool(pages.page_tokens) != tensor.has_tokens:
        word = "needs" if tensor.has_tokens else "must not have"
        raise SpecError(f"{what} {word} an axis 'token'; its axes are {list(pages.shape)}")
    rows = local_rows(group, index, shard)
    if pages.rows != rows:
        raise SpecError(f"{what} has {pages.rows} rows; worker {shard.index} of {shard.count} holds {rows} of them")
    if prod(pages.inner) != prod(tensor.inner):
        raise SpecError(
            f"{what} has inner axes {list(pages.inner)}, the spec says {list(tensor.inner)}; cut keys and values that "
            "lie in one tensor apart by slicing it"
        )
    if not 1 <= pages.pages <= PAGES_MAX:
        raise SpecError(f"{what} has {pages.pages} pages; allowed are 1 to {PAGES_MAX}")
    if pages.overlaps:
        raise SpecError(f"{what} repeats, overlaps or reverses what it holds; register it as the engine allocated it")


def _group_pages(spec: ModelSpec, number: int, members: Mapping[tuple[int, int], TensorPages], pool: str) -> GroupPages:
    group = spec.groups[number]
    layers = tuple(sorted({layer for layer, _ in members}))
    for layer in layers:
        for index, tensor in enumerate(group.tensors):
            if (layer, index) not in members:
                raise SpecError(
                    f"layer {layer} of group {group.name!r} is registered without {tensor.name!r}; register all of its "
                    "tensors"
                )
    sizes = sorted({(pages.pages, pages.page_tokens) for pages in members.values()})
    if len(sizes) > 1:
        raise SpecError(
            f"tensors of group {group.name!r} have pages of different number or tokens ({sizes[0]} and {sizes[-1]}); "
            "a page id must name the same tokens in all of them"
        )
    return GroupPages(number, *sizes[0], pool, layers, dict(members))
