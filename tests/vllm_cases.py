"""What vLLM does around a connector, in small: groups, tables and pages as it has them, and steps that fill them.

Values are those of `kvstore.testing.specs`, so that a page with another request's bytes is noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore.adapters.paged import EngineGroup, EngineTensor, PagedMapping, spec_of
from kvstore.spec import WHOLE
from kvstore.testing.specs import hybrid, state_values, token_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.pool import Prompt
    from kvstore.spec import ModelSpec, Shard
    from kvstore.testing.lagging_device import LaggingDevice

PAGE_TOKENS = 8
PAGES = 64
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def groups_like(spec: ModelSpec, shard: Shard = WHOLE, *, page_tokens: int = PAGE_TOKENS) -> tuple[EngineGroup, ...]:
    """A table for each group of a spec: keys and values in one tensor, a rank's states as bytes one after another."""
    groups = []
    for index, group in enumerate(spec.groups):
        tensors: list[EngineTensor] = []
        at = 0
        for tensor in group.tensors:
            if tensor.has_tokens:
                tensors.append(EngineTensor(tensor, "page row token inner", first=at))
                at += tensor.inner[-1]
            else:
                axes = "page row" + " inner" * len(tensor.inner)
                tensors.append(EngineTensor(tensor, axes, offset_bytes=at))
                at += tensor.rows * tensor.row_bytes // shard.count
        names = tuple(f"model.layers.{layer}.attn" for layer in group.layers)
        groups.append(
            EngineGroup(index, group.rule, group.layers, names, tuple(tensors), page_tokens, group.window_tokens)
        )
    return tuple(groups)


def _layers(group: EngineGroup) -> list[tuple[int, str]]:
    return list(zip(group.layers, group.names, strict=True))


class SmallEngine:
    """One worker's pages, full of bytes that belong to nobody, and the forward passes that fill them."""

    def __init__(
        self,
        like: ModelSpec | None = None,
        *,
        shard: Shard = WHOLE,
        parts: int = 1,
        device: LaggingDevice | None = None,
    ) -> None:
        like = like or hybrid(4)
        self.groups = groups_like(like, shard)
        self.spec = spec_of(self.groups, model="small", weights="seed 0", block_tokens=like.block_tokens)
        self.shard = shard
        self.mapping = PagedMapping(self.spec, self.groups, shard, null_page=0)
        rng = np.random.default_rng(7)
        self.tensors: dict[str, Any] = {}
        for group in self.groups:
            for name in group.names:
                if group.is_state:
                    size = sum(each.spec.rows * each.spec.row_bytes for each in group.tensors) + 64
                    raw = rng.integers(0, 256, (PAGES, 1, 1, size), np.uint8)
                    self.tensors[name] = torch.from_numpy(raw).view(torch.int8)
                    continue
                tensor = group.tensors[0].spec
                width = sum(each.spec.inner[-1] for each in group.tensors) * tensor.dtype.itemsize
                rows = tensor.rows // shard.count
                raw = rng.integers(0, 256, (PAGES * parts, rows, group.page_tokens // parts, width), np.uint8)
                self.tensors[name] = torch.from_numpy(raw).view(getattr(torch, tensor.dtype.label))
        if device is not None:
            self.tensors = {name: device.tensor(tensor) for name, tensor in self.tensors.items()}
        self._free = {group.index: list(range(1, PAGES)) for group in self.groups}
        self._kernel_tokens = {group.index: group.page_tokens // parts for group in self.groups}

    @property
    def hooked(self) -> tuple[str, ...]:
        """Layers whose forward vLLM tells a connector of, in order: those of attention and windows, not of states."""
        pairs = [
            pair for group in self.groups if not group.is_state for pair in zip(group.layers, group.names, strict=True)
        ]
        return tuple(name for _, name in sorted(pairs))

    @property
    def silent(self) -> tuple[str, ...]:
        """The others."""
        return tuple(name for group in self.groups if group.is_state for name in group.names)

    def tables(self, tokens: int) -> tuple[tuple[int, ...], ...]:
        """New pages for a request of this many tokens."""
        columns = {group.index: -(-tokens // group.page_tokens) for group in self.groups}
        return tuple(tuple(self._free[index].pop() for _ in range(count)) for index, count in columns.items())

    def compute(
        self, prompt: Prompt, tables: Sequence[Sequence[int]], start: int, stop: int, *, only: str | None = None
    ) -> None:
        """A forward pass over tokens `[start, stop)`, and the states that it leaves.

        Args:
            only: of the layer of this name.
        """
        for group in self.groups:
            for layer, name in zip(group.layers, group.names, strict=True):
                if only not in (None, name):
                    continue
                for tensor in group.tensors:
                    named = tensor.spec.name
                    if group.is_state:
                        page = tables[group.index][group.state_column(stop)]
                        values = state_values(self.spec, prompt, layer, named, stop, self.shard)
                        self._state(tensor, name, page)[:] = np.frombuffer(values.tobytes(), np.uint8)
                        continue
                    values = token_values(self.spec, prompt, layer, named, start, stop, self.shard)
                    for at in range(start, stop):
                        self._token(group, tensor, name, tables, at)[:] = values[:, at - start]

    def check(self, prompt: Prompt, tables: Sequence[Sequence[int]], length: int, start: int = 0) -> None:
        """Whether the pages hold what going on after `length` tokens needs.

        Raises:
            AssertionError: some byte is another.
        """
        for group in self.groups:
            for layer, name in zip(group.layers, group.names, strict=True):
                for tensor in group.tensors:
                    named = tensor.spec.name
                    what = f"{named} of layer {layer} after {length} tokens"
                    if group.is_state:
                        page = tables[group.index][group.state_column(length)]
                        values = state_values(self.spec, prompt, layer, named, length, self.shard)
                        assert self._state(tensor, name, page).tobytes() == values.tobytes(), what
                        continue
                    first = max(start, group.first_needed(length))
                    values = token_values(self.spec, prompt, layer, named, first, length, self.shard)
                    for at in range(first, length):
                        found = self._token(group, tensor, name, tables, at)
                        assert found.tobytes() == np.ascontiguousarray(values[:, at - first]).tobytes(), f"{what}: {at}"

    def image(self) -> dict[str, bytes]:
        """Everything that lies in all pages."""
        return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in self.tensors.items()}

    def page_bytes(self, name: str, group: EngineGroup, page: int) -> npt.NDArray[np.uint8]:
        """All bytes of one page of a table."""
        parts = group.page_tokens // self._kernel_tokens[group.index] if not group.is_state else 1
        part = self.tensors[name][page * parts : (page + 1) * parts]
        found: npt.NDArray[np.uint8] = part.contiguous().view(torch.uint8).numpy()
        return found

    def _state(self, tensor: EngineTensor, name: str, page: int) -> npt.NDArray[np.uint8]:
        at = tensor.offset_bytes or 0
        size = tensor.spec.rows * tensor.spec.row_bytes // self.shard.count
        flat: npt.NDArray[np.uint8] = self.tensors[name].view(torch.uint8).numpy()[page].reshape(-1)
        return flat[at : at + size]

    def _token(
        self, group: EngineGroup, tensor: EngineTensor, name: str, tables: Sequence[Sequence[int]], at: int
    ) -> npt.NDArray[Any]:
        size = self._kernel_tokens[group.index]
        parts = group.page_tokens // size
        page = tables[group.index][at // group.page_tokens] * parts + at % group.page_tokens // size
        whole = self.tensors[name]
        words: npt.NDArray[Any] = whole.view(WORDS[whole.element_size()]).numpy()
        first = tensor.first or 0
        view: npt.NDArray[Any] = words[page, :, at % size, first : first + tensor.spec.inner[-1]]
        return view.view(tensor.spec.dtype.storage)
