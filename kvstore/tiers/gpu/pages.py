"""An engine's own paged tensors, registered: kvstore copies out of them and into them, and keeps no second copy.

    keys_and_values: torch.Tensor          # the engine's, [2, blocks, tokens, heads, dim]
    axes = "page token row inner"
    pages = Pages(spec, {
        (layer, "keys"): PagedTensor(keys_and_values[0], axes),
        (layer, "values"): PagedTensor(keys_and_values[1], axes),
        ...
    })

Nothing here imports torch before it is given a tensor of it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import SpecError, UnavailableError
from kvstore.spec.shard import WHOLE
from kvstore.tiers.gpu.gather_index import IndexGather
from kvstore.tiers.gpu.gather_native import NativeGather
from kvstore.tiers.gpu.layout import STATE_AXES, TOKEN, TOKEN_AXES, PageLayout, TensorPages
from kvstore.tiers.gpu.packing import check_pages
from kvstore.tiers.gpu.page_copies import PageCopier
from kvstore.tiers.gpu.page_gather import LayerPages
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from kvstore.spec import ModelSpec, Shard
    from kvstore.tiers.gpu.device import Device
    from kvstore.tiers.gpu.packing import Packing, PagePlaces
    from kvstore.tiers.gpu.page_gather import PageGather

GATHER_VARIABLE = "KVSTORE_PAGE_GATHER"
"""Forces `triton`, `native` or `index`."""


@dataclass(frozen=True, eq=False)
class PagedTensor:
    """One tensor of one layer as an engine has it.

    Attributes:
        tensor: a torch tensor over the engine's memory. What lies in one allocation together (keys and values) is cut
            apart by slicing: `both[0]`, `both[..., :dim]`.
        axes: a name for each axis: `page`, `row` (the spec's first axis: heads), `token`, and `inner` for the others in
            the order in which they follow one another in the spec. Empty means the spec's own order,
            `page row token inner ...`, or `page row inner ...` for a state.
    """

    tensor: Any
    axes: str = ""


def state_pages(raw: Any, dtype: Any, shape: Sequence[int], offset_bytes: int = 0) -> Any:
    """One state of each page of a tensor that engines allocate as bytes, `[pages, *shape]`, sharing its memory.

    Args:
        raw: whatever tensor, `[pages, ...]`; what is behind the first axis lies without gaps.
        dtype: a torch type.
        shape: of the state in a page.
        offset_bytes: where it begins in its page.

    Raises:
        SpecError: it does not fit into a page, or does not begin at a multiple of its element's size.
    """
    import torch

    flat = raw.reshape(raw.shape[0], -1).view(torch.uint8)  # a copy if there are gaps
    if flat.data_ptr() != raw.data_ptr():
        raise SpecError("the pages of states have gaps behind their first axis; pass the tensor that was allocated")
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    if offset_bytes < 0 or offset_bytes + size_bytes > flat.shape[1]:
        raise SpecError(
            f"a state of {size_bytes} bytes at {offset_bytes} does not fit into a page of {flat.shape[1]} bytes"
        )
    if (flat.storage_offset() + offset_bytes) % dtype.itemsize or flat.stride(0) % dtype.itemsize:
        raise SpecError(f"a state at byte {offset_bytes} of its page is not aligned to its type {dtype}")
    return flat[:, offset_bytes : offset_bytes + size_bytes].view(dtype).view(flat.shape[0], *shape)


class Pages:
    """The paged tensors of one worker. Any thread; the tensors are kept alive, and nothing is copied here.

    Args:
        spec: the model.
        tensors: by layer and name; all of a layer's group, or none of them.
        shard: whose rows the tensors have.
        pools: name of the numbering of page ids, by group name, where groups do not share one.
        gather: `triton`, `native` or `index`; None takes the fastest, or what `KVSTORE_PAGE_GATHER` says.
        device: where they lie; None opens it through torch.

    Attributes:
        layout: where everything lies in them.
        device: where they lie.
        copier: moves bytes between them and host memory.
        why_not_better: why pages are not gathered in a faster way; empty if there is none.

    Raises:
        SpecError: as `PageLayout.of`. UnavailableError: the device, or the gather that was asked for, cannot be used.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[tuple[int, str], Any],
        *,
        shard: Shard = WHOLE,
        pools: Mapping[str, str] | None = None,
        gather: str | None = None,
        device: Device | None = None,
    ) -> None:
        named: dict[tuple[int, str], tuple[Any, TensorPages]] = {}
        for (layer, name), given in tensors.items():
            paged = given if isinstance(given, PagedTensor) else PagedTensor(given)
            named[layer, name] = _named(paged, spec, layer, name)
        self.layout = PageLayout.of(spec, shard, {place: pages for place, (_, pages) in named.items()}, pools)
        self._layers: dict[tuple[int, int, int], LayerPages] = {}
        for (layer, name), (words, pages) in named.items():
            number = spec.group_index(layer, name)
            index = next(i for i, tensor in enumerate(spec.groups[number].tensors) if tensor.name == name)
            self._layers[number, layer, index] = LayerPages(pages, words)
        self.device = device or open_device(self.layout.device)
        for (layer, name), (words, _) in named.items():
            if not self.device.holds(words):
                raise SpecError(f"{name!r} of layer {layer} does not lie in the memory of device {self.device.name}")
        self.copier = PageCopier(self.device)
        self._gather, self.why_not_better = choose_gather(words.device.type, gather)

    @property
    def spec(self) -> ModelSpec:
        return self.layout.spec

    @property
    def shard(self) -> Shard:
        return self.layout.shard

    @property
    def gather_name(self) -> str:
        """How pages are gathered: `triton`, `native` or `index`."""
        return self._gather.name

    @property
    def size_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(each.words.numel() * each.words.element_size() for each in self._layers.values())

    def page_bytes(self, group: int) -> int:
        """Bytes of one page in all tensors of a group."""
        layers = (each for (number, *_), each in self._layers.items() if number == group)
        return sum(each.words[0].numel() * each.words.element_size() for each in layers)

    def ids(self, group: int, page_ids: Any, *, least: int = 0) -> npt.NDArray[np.int64]:
        """Page ids of a group as an array.

        Args:
            least: the smallest number that is allowed; below 0 for lists with pages that are not there.

        Raises:
            SpecError: one of them is none of its pages.
        """
        if hasattr(page_ids, "detach"):
            page_ids = page_ids.detach().cpu().numpy()
        ids = np.asarray(page_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise SpecError(f"page ids are a list of whole numbers, not {ids.dtype.name} of shape {list(ids.shape)}")
        ids = ids.astype(np.int64)
        check_pages(ids, self.layout.group(group), self.spec.groups[group].name, least=least)
        return ids

    def pack(self, group: int, packings: Mapping[int, Packing], places: PagePlaces, packed: Any) -> None:
        """Copy tokens of a group's pages into packed memory, on the stream that is current.

        Args:
            packings: by number of the tensor in the group.
            places: of all images.
            packed: bytes on the same device, `[n]`, that begin and end at multiples of 64.

        Raises:
            SpecError: a page that the group does not have, or a layer that is not registered.
        """
        for index, packing in packings.items():
            self._gather.pack(self._checked(group, index, packing, places), packing, places, packed)

    def unpack(self, group: int, packings: Mapping[int, Packing], places: PagePlaces, packed: Any) -> None:
        """Copy packed memory into a group's pages, as `pack` copies out of them."""
        for index, packing in packings.items():
            self._gather.unpack(self._checked(group, index, packing, places), packing, places, packed)

    def _checked(self, group: int, index: int, packing: Packing, places: PagePlaces) -> list[LayerPages]:
        found = self.layout.group(group)
        places.check(found, self.spec.groups[group].name)
        lacking = sorted(set(packing.layers) - set(found.layers))
        if lacking:
            name = self.spec.groups[group].name
            raise SpecError(
                f"layer {lacking[0]} of group {name!r} has no registered pages; register it or leave it out"
            )
        return [self._layers[group, layer, index] for layer in packing.layers]


def _named(paged: PagedTensor, spec: ModelSpec, layer: int, name: str) -> tuple[Any, TensorPages]:
    """An engine's tensor as words in the spec's order of axes, and what is known of it."""
    what = f"{name!r} of layer {layer}"
    tensor = paged.tensor
    if not hasattr(tensor, "data_ptr") or str(getattr(tensor, "layout", "")) != "torch.strided":
        raise SpecError(f"{what} is {type(tensor).__name__}, no plain torch tensor; register the engine's own tensor")
    group = spec.groups[spec.group_index(layer, name)]
    has_tokens = next(each for each in group.tensors if each.name == name).has_tokens
    default = TOKEN_AXES if has_tokens else STATE_AXES
    axes = paged.axes.split() or [*default, *["inner"] * (tensor.dim() - len(default))]
    label = str(tensor.dtype).removeprefix("torch.")
    pages = TensorPages.of(tensor.shape, tensor.stride(), axes, label, str(tensor.device), what)
    order = [axes.index(each) for each in (TOKEN_AXES if TOKEN in axes else STATE_AXES)]
    order += [number for number, each in enumerate(axes) if each == "inner"]
    words = tensor.detach().permute(order).view(_word_type(tensor.element_size(), what))
    return (words if TOKEN in axes else words.unsqueeze(2)), pages


def _word_type(size: int, what: str) -> Any:
    import torch

    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if size not in types:
        raise SpecError(f"{what} has elements of {size} bytes; a spec has such of 1, 2, 4 or 8")
    return types[size]


def choose_gather(device_type: str, asked: str | None = None) -> tuple[PageGather, str]:
    """How pages on a device are gathered, and why not better; see `Pages`.

    Raises:
        UnavailableError: what was asked for cannot run.
    """
    asked = asked or os.environ.get(GATHER_VARIABLE) or None
    if asked not in (None, "triton", "native", "index"):
        raise UnavailableError(f"there is no gather {asked!r}; choose 'triton', 'native' or 'index'")
    if asked == "index":
        return IndexGather(), f"{GATHER_VARIABLE} or the caller asked for it"
    if asked == "native" or (asked is None and device_type == "cpu"):
        missing = why_no_gather("native", device_type)
        if missing:
            raise UnavailableError(missing)
        return NativeGather(), ""
    missing = why_no_gather("triton", device_type, is_asked=asked == "triton")
    if asked == "triton" and missing:
        raise UnavailableError(f"pages cannot be gathered by Triton: {missing}")
    return (IndexGather(), missing) if missing else (_triton_gather(), "")


def why_no_gather(name: str, device_type: str, *, is_asked: bool = False) -> str:
    """Why pages on a device cannot be gathered by `triton`, `native` or `index`; empty if they can.

    Args:
        is_asked: by this name, so that Triton's interpreter counts where it is switched on.
    """
    if name == "index":
        return ""
    if name == "native":
        on_host = device_type == "cpu"
        return "" if on_host else f"pages on device {device_type} cannot be gathered by the host's native copy"
    is_interpreted = is_asked and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not is_interpreted:
        return f"the pages lie on device {device_type}, and its kernel is for cuda"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install it, as torch for CUDA does"
    return ""


@lru_cache(maxsize=1)
def _triton_gather() -> PageGather:
    from kvstore.tiers.gpu.gather_triton import TritonGather

    return TritonGather()
