"""Paged tensors as engines allocate them, and what lies in them as plain NumPy sees it. Needs torch.

    engine = EnginePages.alike(spec, style="two blocks", pages=32, page_tokens=8)
    pages = engine.register()
    expected = engine.tokens(layer, "keys", page_ids, start, stop)   # the oracle: a loop over tokens

Layouts that engines of the field use have names; `EnginePages.of` takes any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.record.rows import local_rows
from kvstore.spec import ReuseRule
from kvstore.spec.shard import WHOLE
from kvstore.testing.specs import state_values, token_values
from kvstore.tiers.gpu.pages import PagedTensor, Pages, state_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from kvstore.pool import Prompt
    from kvstore.pool.held import HeldRecord
    from kvstore.spec import CacheGroup, ModelSpec, Shard, TensorSpec
    from kvstore.tiers.gpu.device import Device

STYLES = ("canonical", "heads first", "two blocks", "split heads", "one allocation")
"""`heads first`: `[pages, heads, tokens, both dims]`. `two blocks`: `[2, pages, tokens, heads, dim]`. `split heads`:
`[pages, heads, dim / x, tokens, x]`. `one allocation`: pages of bytes that attention and states share."""


@dataclass
class EnginePages:
    """An engine's tensors.

    Attributes:
        spec, shard: the model, and the worker whose rows they have.
        tensors: by layer and name, as they are registered.
        pages, page_tokens: how many there are of each group, and tokens of one of them; by group name.
        allocations: the memory that they are views of.
        device: where they lie; None opens what torch calls it.
    """

    spec: ModelSpec
    shard: Shard
    tensors: dict[tuple[int, str], PagedTensor]
    pages: int
    page_tokens: Mapping[str, int]
    allocations: list[Any]
    device: Device | None = None
    pools: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def alike(
        cls,
        spec: ModelSpec,
        *,
        style: str = "canonical",
        pages: int = 16,
        page_tokens: int | Mapping[str, int] = 4,
        shard: Shard = WHOLE,
        seed: int = 0,
        device: Device | str = "cpu",
    ) -> EnginePages:
        """Tensors of every layer in one of `STYLES`, full of random bytes."""
        sizes = _page_tokens(spec, page_tokens)
        on: Any = (lambda host: host.to(device)) if isinstance(device, str) else device.tensor  # type: ignore[attr-defined]
        make = {"one allocation": _one_allocation}.get(style, _per_group)
        rng = np.random.default_rng(seed)
        tensors: dict[tuple[int, str], PagedTensor] = {}
        allocations: list[Any] = []

        def allocate(shape: Sequence[int], dtype: str) -> Any:
            allocations.append(on(_random(shape, dtype, rng)))
            return allocations[-1]

        for group in spec.groups:
            for layer in group.layers:
                rows = [local_rows(group, index, shard) for index in range(len(group.tensors))]
                named = make(spec, group, rows, pages, sizes.get(group.name, 0), style, allocate)
                tensors.update({(layer, name): paged for name, paged in named.items()})
        return cls(spec, shard, tensors, pages, sizes, allocations, device=None if isinstance(device, str) else device)

    def register(self, *, gather: str | None = None) -> Pages:
        return Pages(
            self.spec, self.tensors, shard=self.shard, gather=gather, device=self.device, pools=dict(self.pools)
        )

    def array(self, layer: int, name: str) -> npt.NDArray[Any]:
        """What lies in the pages of a tensor now, `[pages, rows, page_tokens, *inner]` or `[pages, rows, *inner]`.

        Of the spec's storage type, a copy.
        """
        paged, tensor, _ = self._described(layer, name)
        words = _canonical(paged, tensor.has_tokens).cpu().contiguous()
        array = _numpy_words(words).view(tensor.dtype.storage)
        outer = array.shape[: 3 if tensor.has_tokens else 2]
        return array.reshape(*outer, *tensor.inner).copy()

    def write(self, layer: int, name: str, array: npt.NDArray[Any]) -> None:
        """Have what `array` gives lie in the pages of a tensor, as an engine's kernels would leave it there."""
        import torch

        paged, tensor, _ = self._described(layer, name)
        view = _canonical(paged, tensor.has_tokens)
        words = torch.from_numpy(np.ascontiguousarray(array).view(_word_dtype(tensor.dtype.itemsize)).copy())
        view.copy_(words.reshape(view.shape))

    def _described(self, layer: int, name: str) -> tuple[PagedTensor, TensorSpec, CacheGroup]:
        group = self.spec.groups[self.spec.group_index(layer, name)]
        return self.tensors[layer, name], next(each for each in group.tensors if each.name == name), group

    def tokens(self, layer: int, name: str, page_ids: Sequence[int], start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens `[start, stop)`, counted from the first page's begin: `[rows, tokens, *inner]`."""
        _, _, group = self._described(layer, name)
        size = self.page_tokens[group.name]
        whole = self.array(layer, name)
        return np.stack([whole[page_ids[at // size], :, at % size] for at in range(start, stop)], axis=1)

    def put_tokens(self, layer: int, name: str, page_ids: Sequence[int], start: int, values: npt.NDArray[Any]) -> None:
        """Have the tokens from `start` on lie in these pages: `[rows, tokens, *inner]`."""
        _, _, group = self._described(layer, name)
        size = self.page_tokens[group.name]
        whole = self.array(layer, name)
        for number in range(values.shape[1]):
            whole[page_ids[(start + number) // size], :, (start + number) % size] = values[:, number]
        self.write(layer, name, whole)

    def put_state(self, layer: int, name: str, page: int, values: npt.NDArray[Any]) -> None:
        """Have a state lie in a page: `[rows, *inner]`."""
        whole = self.array(layer, name)
        whole[page] = values
        self.write(layer, name, whole)

    def put_prompt(
        self,
        prompt: Prompt,
        page_ids: Sequence[int],
        states: Mapping[int, Mapping[str, int]] | None = None,
        *,
        upto: int | None = None,
    ) -> None:
        """Have what belongs to a prompt lie in pages: its tokens, and its states by length and group.

        Values are those of `kvstore.testing.specs`.
        """
        stop = len(prompt) if upto is None else upto
        for group in self.spec.groups:
            for layer in group.layers:
                for tensor in group.tensors:
                    if tensor.has_tokens:
                        values = token_values(self.spec, prompt, layer, tensor.name, 0, stop, self.shard)
                        self.put_tokens(layer, tensor.name, page_ids, 0, values)
                        continue
                    for at, pages in (states or {}).items():
                        values = state_values(self.spec, prompt, layer, tensor.name, at, self.shard)
                        self.put_state(layer, tensor.name, pages[group.name], values)

    def check_prompt(
        self,
        prompt: Prompt,
        page_ids: Sequence[int],
        start: int,
        stop: int,
        states: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        """Compare what lies in pages with what belongs to a prompt: attention of `[start, stop)`, windows, states.

        Raises:
            AssertionError: some value is another.
        """
        for group in self.spec.groups:
            for layer in group.layers:
                for tensor in group.tensors:
                    what = f"{tensor.name!r} of layer {layer}"
                    if group.rule is ReuseRule.ATTENTION:
                        found = self.tokens(layer, tensor.name, page_ids, start, stop)
                        wanted = token_values(self.spec, prompt, layer, tensor.name, start, stop, self.shard)
                        assert found.tobytes() == wanted.tobytes(), what
                        continue
                    for at, pages in (states or {}).items():
                        wanted = state_values(self.spec, prompt, layer, tensor.name, at, self.shard)
                        if tensor.has_tokens:
                            found = self.tokens(layer, tensor.name, page_ids, at - wanted.shape[1], at)
                        else:
                            found = self.array(layer, tensor.name)[pages[group.name]]
                        assert found.tobytes() == wanted.tobytes(), f"{what} at {at}"

    def put_record(self, record: HeldRecord, page_ids: Sequence[int], first_token: int) -> None:
        """Have what a record of all units holds lie in pages, its tokens from `first_token` on."""
        from kvstore.record import Record

        opened = Record(record.layout, record.memory)
        for layer in record.layout.span.layers:
            for tensor in record.layout.group.tensors:
                values = opened.tensor(layer, tensor.name)
                if tensor.has_tokens:
                    held = values[:, : record.header.valid_tokens]
                    self.put_tokens(layer, tensor.name, page_ids, first_token, held)
                else:
                    self.put_state(layer, tensor.name, page_ids[0], values)


def _page_tokens(spec: ModelSpec, given: int | Mapping[str, int]) -> dict[str, int]:
    named = {group.name for group in spec.groups if group.tensors[0].has_tokens}
    return dict.fromkeys(named, given) if isinstance(given, int) else dict(given)


def _random(shape: Sequence[int], dtype: str, rng: np.random.Generator) -> Any:
    import torch

    kind = getattr(torch, dtype)
    data = rng.integers(0, 256, prod(shape) * kind.itemsize, np.uint8)
    return torch.from_numpy(data).view(kind).reshape(tuple(shape))


def _per_group(
    spec: ModelSpec,
    group: CacheGroup,
    rows: Sequence[int],
    pages: int,
    page_tokens: int,
    style: str,
    allocate: Callable[[Sequence[int], str], Any],
) -> dict[str, PagedTensor]:
    """Tensors of one layer, keys and values together where the style has them so."""
    tensors = group.tensors
    are_alike = len({(tensor.dtype, tensor.inner, count) for tensor, count in zip(tensors, rows, strict=True)}) == 1
    if page_tokens and are_alike and style == "two blocks":
        both = allocate((len(tensors), pages, page_tokens, rows[0], *tensors[0].inner), tensors[0].dtype.label)
        axes = " ".join(["page", "token", "row", *["inner"] * len(tensors[0].inner)])
        return {tensor.name: PagedTensor(both[number], axes) for number, tensor in enumerate(tensors)}
    if page_tokens and are_alike and style == "heads first" and len(tensors[0].inner) == 1:
        dim = tensors[0].inner[0]
        both = allocate((pages, rows[0], page_tokens, len(tensors) * dim), tensors[0].dtype.label)
        return {
            tensor.name: PagedTensor(both[..., number * dim : (number + 1) * dim], "page row token inner")
            for number, tensor in enumerate(tensors)
        }
    found = {}
    for tensor, count in zip(tensors, rows, strict=True):
        if page_tokens and style == "split heads" and len(tensor.inner) == 1 and tensor.inner[0] % 2 == 0:
            whole = allocate((pages, count, tensor.inner[0] // 2, page_tokens, 2), tensor.dtype.label)
            found[tensor.name] = PagedTensor(whole, "page row inner token inner")
        elif page_tokens:
            found[tensor.name] = PagedTensor(allocate((pages, count, page_tokens, *tensor.inner), tensor.dtype.label))
        else:
            found[tensor.name] = PagedTensor(allocate((pages, count, *tensor.inner), tensor.dtype.label))
    return found


def _one_allocation(
    spec: ModelSpec,
    group: CacheGroup,
    rows: Sequence[int],
    pages: int,
    page_tokens: int,
    style: str,
    allocate: Callable[[Sequence[int], str], Any],
) -> dict[str, PagedTensor]:
    """Tensors of one layer one behind the other in pages of bytes, padded as an engine pads the smaller kind."""
    shapes = [
        (tensor, (count, page_tokens, *tensor.inner) if page_tokens else (count, *tensor.inner))
        for tensor, count in zip(group.tensors, rows, strict=True)
    ]
    sizes = [-(-prod(shape) * tensor.dtype.itemsize // 8) * 8 for tensor, shape in shapes]
    raw = allocate((pages, 1, 1, sum(sizes) + 40), "int8")
    found = {}
    at = 0
    for (tensor, shape), size in zip(shapes, sizes, strict=True):
        import torch

        found[tensor.name] = PagedTensor(state_pages(raw, getattr(torch, tensor.dtype.label), shape, at))
        at += size
    return found


def _canonical(paged: PagedTensor, has_tokens: bool) -> Any:
    """The tensor as words, its axes in the spec's order: by torch alone, without what is tested."""
    import torch

    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[paged.tensor.element_size()]
    if not paged.axes:
        return paged.tensor.view(words)
    axes = paged.axes.split()
    first = ["page", "row", "token"] if has_tokens else ["page", "row"]
    order = [*(axes.index(name) for name in first), *(i for i, name in enumerate(axes) if name == "inner")]
    return paged.tensor.view(words).permute(order)


def _numpy_words(words: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = words.numpy()
    return array


def _word_dtype(size: int) -> npt.DTypeLike:
    return {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[size]
