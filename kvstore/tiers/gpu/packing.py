"""Packed memory between pages and records: the tokens of many blocks, gathered into the form that pieces have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import SpecError
from kvstore.record.rows import local_rows, runs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from kvstore.record import RecordLayout
    from kvstore.spec import CacheGroup, Shard
    from kvstore.tiers.gpu.layout import GroupPages

IMAGE_ALIGN_BYTES = 64
"""Images and the parts of layers begin at multiples of this, so that a gather moves whole words."""


@dataclass(frozen=True)
class Packing:
    """How one tensor of several layers lies in packed memory: images one after the other. Sizes in bytes.

    In an image each layer has its `[rows, places, *inner]` without gaps, as the pieces of a record have.

    Attributes:
        layers: which.
        images: how many.
        image_bytes: from one to the next.
        places: for tokens in each image; 1 for a state.
        layer_offsets: where each layer's part begins in an image.
    """

    layers: tuple[int, ...]
    images: int
    image_bytes: int
    places: int
    layer_offsets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PagePlaces:
    """Where in pages the tokens of packed images lie. Arrays of shape `[images * places]`.

    Attributes:
        pages: page of each token; -1 where an image has no token: it is packed as zeros, and not unpacked.
        offsets: its number within the page; 0 for a state.
    """

    pages: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of_tokens(
        cls, page_ids: npt.NDArray[np.int64], page_tokens: int, start: int, stop: int, places: int | None = None
    ) -> PagePlaces:
        """Tokens `[start, stop)`, counted from the begin of the first page, and none in what is left of `places`."""
        count = stop - start
        tokens = np.arange(start, stop, dtype=np.int64)
        pages = np.full(count if places is None else places, -1, np.int64)
        offsets = np.zeros_like(pages)
        pages[:count] = page_ids[tokens // page_tokens]
        offsets[:count] = tokens % page_tokens
        return cls(pages, offsets)

    @classmethod
    def of_states(cls, page_ids: npt.NDArray[np.int64]) -> PagePlaces:
        """A page for each image."""
        return cls(page_ids, np.zeros_like(page_ids))

    @classmethod
    def join(cls, parts: Sequence[PagePlaces]) -> PagePlaces:
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([part.pages for part in parts]), np.concatenate([part.offsets for part in parts]))

    def __len__(self) -> int:
        return len(self.pages)

    @cached_property
    def held(self) -> npt.NDArray[np.int64]:
        """Places with a token."""
        return np.flatnonzero(self.pages >= 0)

    @property
    def are_all_held(self) -> bool:
        return len(self.held) == len(self.pages)

    def check(self, group: GroupPages, name: str) -> None:
        """Raise `SpecError` unless every page is one of a group's."""
        check_pages(self.pages, group, name, least=-1)


def check_pages(page_ids: npt.NDArray[np.int64], group: GroupPages, name: str, *, least: int = 0) -> None:
    """Raise `SpecError` unless every id names a page of a group: what else it names is memory of something else."""
    if not page_ids.size:
        return
    low, high = int(page_ids.min()), int(page_ids.max())
    if low < least or high >= group.pages:
        wrong = low if low < least else high
        raise SpecError(
            f"page {wrong} of group {name!r} is none of its {group.pages} pages (0 to {group.pages - 1}); pass the "
            "engine's own page ids"
        )


def packings_of_records(layout: RecordLayout, shard: Shard, images: int) -> dict[int, Packing]:
    """Records of one class as images, each the body of a record, by number of the tensor in the group.

    Raises:
        SpecError: the records hold other rows than the worker does.
    """
    image_bytes = -(-layout.body_bytes // IMAGE_ALIGN_BYTES) * IMAGE_ALIGN_BYTES
    packings = {}
    for index in layout.columns:
        pieces = layout.tensor_pieces(layout.span.layers[0], index)
        runs = runs_of(layout, layout.span.layers[0], index, shard)
        rows = [row for run in runs for row in range(run.row, run.row + run.rows)]
        if len(runs) != len(pieces) or rows != list(range(local_rows(layout.group, index, shard))):
            raise SpecError(
                f"units {layout.units.start} to {layout.units.stop} of group {layout.group.name!r} are not the rows "
                f"that worker {shard.index} of {shard.count} has in its pages"
            )
        offsets = tuple(
            layout.pieces[layout.tensor_pieces(layer, index).start].offset - layout.header_bytes
            for layer in layout.span.layers
        )
        packings[index] = Packing(layout.span.layers, images, image_bytes, layout.capacity_tokens or 1, offsets)
    return packings


def packings_of_tensors(
    group: CacheGroup, shard: Shard, layers: tuple[int, ...], places: int
) -> tuple[dict[int, Packing], int]:
    """One image of a run of tokens, or of a state, by number of the tensor in the group; and its bytes."""
    at = 0
    packings = {}
    for index, tensor in enumerate(group.tensors):
        rows = local_rows(group, index, shard)
        layer_bytes = -(-rows * places * tensor.row_bytes // IMAGE_ALIGN_BYTES) * IMAGE_ALIGN_BYTES
        if rows:
            packings[index] = Packing(
                layers, 1, 0, places, tuple(at + number * layer_bytes for number in range(len(layers)))
            )
        at += layer_bytes * len(layers)
    return packings, at


def tensor_views(
    packed: npt.NDArray[np.uint8], packings: Mapping[int, Packing], group: CacheGroup, shard: Shard, layer: int
) -> dict[str, npt.NDArray[np.generic]]:
    """The tensors of one layer in the one image that `packings_of_tensors` lays out, as a writer or lease takes them.

    Of a state or a block: `[rows, tokens, *inner]` or `[rows, *inner]`, in the storage type.
    """
    views: dict[str, npt.NDArray[np.generic]] = {}
    for index, packing in packings.items():
        tensor = group.tensors[index]
        shape = tensor.shape(local_rows(group, index, shard), packing.places)
        begin = packing.layer_offsets[packing.layers.index(layer)]
        size_bytes = tensor.dtype.itemsize * int(np.prod(shape))
        views[tensor.name] = packed[begin : begin + size_bytes].view(tensor.dtype.storage).reshape(shape)
    return views
