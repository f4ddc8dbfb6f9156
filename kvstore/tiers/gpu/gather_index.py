"""Pages and packed memory through torch's own indexed copies: for every device, and without a compiler."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from kvstore.tiers.gpu.page_gather import LayerPages, PageGather
from kvstore.tiers.gpu.torch_device import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.tiers.gpu.packing import Packing, PagePlaces


class IndexGather(PageGather):
    """Two indexed copies for each tensor of each layer."""

    @property
    def name(self) -> str:
        return "index"

    def pack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        device = packed.device
        pages = upload(places.pages.clip(min=0), device)
        offsets = upload(places.offsets, device)
        is_lacking = None if places.are_all_held else upload(places.pages < 0, device)
        for layer, begin in zip(layers, packing.layer_offsets, strict=True):
            values = layer.words[pages, :, offsets]  # [images * places, rows, *inner]
            if is_lacking is not None:
                values[is_lacking] = 0
            image = _image_view(layer, packing, begin, packed)
            image.copy_(values.view(packing.images, packing.places, *values.shape[1:]))

    def unpack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        device = packed.device
        held = places.held
        pages = upload(places.pages[held], device)
        offsets = upload(places.offsets[held], device)
        chosen = None if places.are_all_held else upload(held, device)
        for layer, begin in zip(layers, packing.layer_offsets, strict=True):
            image = _image_view(layer, packing, begin, packed)
            values = image.reshape(packing.images * packing.places, *image.shape[2:])
            layer.words[pages, :, offsets] = values if chosen is None else values[chosen]


def _image_view(layer: LayerPages, packing: Packing, begin: int, packed: Any) -> Any:
    """One layer's part of all images as `[images, places, rows, *inner]`."""
    import torch

    words = layer.words
    size = words.element_size()
    inner = layer.pages.inner
    inner_strides = [prod(inner[axis + 1 :]) for axis in range(len(inner))]
    row = prod(inner)
    return torch.as_strided(
        packed.view(words.dtype),
        (packing.images, packing.places, layer.pages.rows, *inner),
        (packing.image_bytes // size, row, packing.places * row, *inner_strides),
        packed.view(words.dtype).storage_offset() + begin // size,
    )
