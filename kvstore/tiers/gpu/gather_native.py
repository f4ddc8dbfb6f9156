"""Pages and packed memory through the native copy: where an engine's pages lie in host memory."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore._native import copy_rows
from kvstore.record.copy import join_plans, plan_bytes
from kvstore.record.threads import copy_threads
from kvstore.tiers.gpu.page_gather import LayerPages, PageGather

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.tiers.gpu.packing import Packing, PagePlaces


class NativeGather(PageGather):
    """One native call for all layers of a tensor."""

    @property
    def name(self) -> str:
        return "native"

    def pack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        if not places.are_all_held:
            _clear(layers, packing, places, packed)
        _copy(_parts(layers, packing, places, packed), is_packing=True)

    def unpack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        _copy(_parts(layers, packing, places, packed), is_packing=False)


_Part = tuple["npt.NDArray[np.int64]", "npt.NDArray[np.int64]", "npt.NDArray[np.int64]", int, tuple[int, int]]
"""Addresses in pages and in images, tokens of each run, bytes of each token, and strides: in images, in pages."""


def _parts(layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> list[_Part]:
    """Runs of tokens that follow one another in a page and in an image, for each row and run of its elements."""
    number = np.arange(len(places))
    is_first = np.ones(len(places), np.bool_)
    is_first[1:] = (
        (places.pages[1:] != places.pages[:-1])
        | (places.offsets[1:] != places.offsets[:-1] + 1)
        | (number[1:] % packing.places == 0)
    )
    firsts = np.flatnonzero(is_first)
    counts = np.diff(np.append(firsts, len(places)))
    is_held = places.pages[firsts] >= 0
    firsts, counts = firsts[is_held], counts[is_held]
    images, image_places = np.divmod(firsts, packing.places)
    parts = []
    for layer, begin in zip(layers, packing.layer_offsets, strict=True):
        pages, size = layer.pages, layer.words.element_size()
        row_bytes, run_bytes = prod(pages.inner) * size, pages.inner_run * size
        rows = np.arange(pages.rows)
        runs = pages.run_offsets * size
        in_pages = (
            layer.words.data_ptr()
            + (places.pages[firsts] * pages.page_stride + places.offsets[firsts] * pages.token_stride)[:, None, None]
            * size
            + (rows * pages.row_stride * size)[:, None]
            + runs
        )
        in_images = (
            packed.data_ptr()
            + begin
            + (images * packing.image_bytes)[:, None, None]
            + (rows * packing.places)[:, None] * row_bytes
            + (image_places * row_bytes)[:, None, None]
            + np.arange(len(runs)) * run_bytes
        )
        token_bytes = pages.token_stride * size or run_bytes  # that of a state is not used
        parts.append((in_pages, in_images, counts[:, None, None], run_bytes, (row_bytes, token_bytes)))
    return parts


def _copy(parts: Sequence[_Part], *, is_packing: bool) -> None:
    plans = []
    for in_pages, in_images, counts, row_bytes, strides in parts:
        plan = np.empty((*in_pages.shape, 6), np.uint64)
        ends, steps = (in_images, in_pages), strides
        if not is_packing:
            ends, steps = ends[::-1], steps[::-1]
        plan[..., 0], plan[..., 1] = ends
        plan[..., 2], plan[..., 3] = counts, row_bytes
        # A single token has no stride, and that of an axis of one element is arbitrary.
        plan[..., 4], plan[..., 5] = (max(step, row_bytes) for step in steps)
        plans.append(plan.reshape(-1, 6))
    plan = join_plans(plans, 6)
    copy_rows(plan, threads=copy_threads(plan_bytes(plan)))


def _clear(layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
    """Zero the images of which some token is not there."""
    host = packed.numpy()
    for image in np.unique(np.flatnonzero(places.pages < 0) // packing.places).tolist():
        for layer, begin in zip(layers, packing.layer_offsets, strict=True):
            size_bytes = layer.pages.rows * packing.places * prod(layer.pages.inner) * layer.words.element_size()
            start = image * packing.image_bytes + begin
            host[start : start + size_bytes] = 0
