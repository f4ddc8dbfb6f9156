"""Pages and packed memory through one Triton kernel: a launch moves one tensor of all layers of a span.

Imported only where Triton is. With `TRITON_INTERPRET=1` in the environment before the import, the kernel runs on the
host: for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import triton
import triton.language as tl

from kvstore.tiers.gpu.page_gather import LayerPages, PageGather
from kvstore.tiers.gpu.torch_device import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.tiers.gpu.packing import Packing, PagePlaces

WORD_BYTES_MAX = 8
TILE_WORDS = 2048
"""Words that one program moves at a time."""
TILE_WIDTH_MAX = 256


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def move_words(  # type: ignore[no-untyped-def]
    packed,  # words of all images
    bases,  # address of each layer's tensor, [layers]
    layer_offsets,  # word of an image at which each layer begins, [layers]
    run_offsets,  # where each run of a row's words begins in a page, [runs]
    place_offsets,  # where each token begins in its tensor, -1 for none, [images * places]
    layers,
    rows,
    places,
    tiles,  # of places, in each row
    image_words,
    row_words,  # of one row of one token
    run_words,
    row_stride,
    WORD: tl.constexpr,  # noqa: N803
    TILE_PLACES: tl.constexpr,  # noqa: N803
    TILE_WIDTH: tl.constexpr,  # noqa: N803
    IS_PACKING: tl.constexpr,  # noqa: N803
):
    """One program moves a tile of places of one row of one layer of one image."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles) % rows
    layer = (program // tiles // rows) % layers
    image = (program // tiles // rows // layers).to(tl.int64)
    base = tl.load(bases + layer).to(tl.pointer_type(WORD))
    place = tile * TILE_PLACES + tl.arange(0, TILE_PLACES)
    is_place = place < places
    begin = tl.load(place_offsets + image * places + place, mask=is_place, other=-1)
    in_page = begin + row.to(tl.int64) * row_stride
    in_image = image * image_words + tl.load(layer_offsets + layer) + (row * places + place).to(tl.int64) * row_words
    for first in range(0, row_words, TILE_WIDTH):
        word = first + tl.arange(0, TILE_WIDTH)
        is_word = word < row_words
        step = tl.load(run_offsets + word // run_words, mask=is_word, other=0) + word % run_words
        is_held = (begin >= 0)[:, None] & is_word[None, :]
        pages = base + in_page[:, None] + step[None, :]
        images = packed + in_image[:, None] + word[None, :]
        if IS_PACKING:
            values = tl.load(pages, mask=is_held, other=0)
            tl.store(images, values, mask=is_place[:, None] & is_word[None, :])
        else:
            values = tl.load(images, mask=is_held, other=0)
            tl.store(pages, values, mask=is_held)


@dataclass(frozen=True, eq=False)
class _Tables:
    """What the kernel reads, as one array for one upload; sizes in words."""

    word_bytes: int
    bases: npt.NDArray[np.int64]
    layer_offsets: npt.NDArray[np.int64]
    run_offsets: npt.NDArray[np.int64]
    place_offsets: npt.NDArray[np.int64]

    def uploaded(self, device: Any) -> list[Any]:
        parts = [self.bases, self.layer_offsets, self.run_offsets, self.place_offsets]
        ends = np.cumsum([len(part) for part in parts])
        table = upload(np.concatenate(parts), device)
        return [table[end - len(part) : end] for part, end in zip(parts, ends.tolist(), strict=True)]


class TritonGather(PageGather):
    """One launch for the layers whose tensors have equal strides, which mostly are all of them."""

    @property
    def name(self) -> str:
        return "triton"

    def pack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        self._move(layers, packing, places, packed, is_packing=True)

    def unpack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        self._move(layers, packing, places, packed, is_packing=False)

    def _move(
        self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any, *, is_packing: bool
    ) -> None:
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, layer in enumerate(layers):
            alike.setdefault((*layer.pages.strides, *layer.pages.inner), []).append(number)
        for members in alike.values():
            chosen = [layers[number] for number in members]
            offsets = [packing.layer_offsets[number] for number in members]
            _launch(chosen, offsets, packing, places, packed, is_packing=is_packing)


def _launch(
    layers: Sequence[LayerPages],
    offsets: Sequence[int],
    packing: Packing,
    places: PagePlaces,
    packed: Any,
    *,
    is_packing: bool,
) -> None:
    import torch

    pages = layers[0].pages
    tables = _tables(layers, offsets, packing, places, packed)
    size = layers[0].words.element_size()
    word_bytes = tables.word_bytes
    row_words = prod(pages.inner) * size // word_bytes
    width = min(TILE_WIDTH_MAX, triton.next_power_of_2(row_words))
    height = max(1, min(TILE_WORDS // width, triton.next_power_of_2(packing.places)))
    tiles = triton.cdiv(packing.places, height)
    words = {1: (torch.uint8, tl.uint8), 2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32)}
    torch_word, word = words.get(word_bytes, (torch.int64, tl.int64))
    move_words[(packing.images * len(layers) * pages.rows * tiles,)](
        packed.view(torch_word),
        *tables.uploaded(packed.device),
        len(layers),
        pages.rows,
        packing.places,
        tiles,
        packing.image_bytes // word_bytes,
        row_words,
        pages.inner_run * size // word_bytes,
        pages.row_stride * size // word_bytes,
        WORD=word,
        TILE_PLACES=height,
        TILE_WIDTH=width,
        IS_PACKING=is_packing,
    )


def _tables(
    layers: Sequence[LayerPages], offsets: Sequence[int], packing: Packing, places: PagePlaces, packed: Any
) -> _Tables:
    """In the widest words that everything is a multiple of."""
    pages = layers[0].pages
    size = layers[0].words.element_size()
    bases = np.array([layer.words.data_ptr() for layer in layers], np.int64)
    begins = np.array(offsets, np.int64)
    runs = pages.run_offsets * size
    steps = [stride * size for stride in (pages.page_stride, pages.row_stride, pages.token_stride)]
    common = gcd(
        WORD_BYTES_MAX, pages.inner_run * size, packing.image_bytes, packed.data_ptr(), *steps,
        *bases.tolist(), *begins.tolist(), *runs.tolist(),
    )  # fmt: skip
    held = places.pages >= 0
    place_offsets = np.where(held, places.pages * steps[0] + places.offsets * steps[2], -common) // common
    return _Tables(common, bases, begins // common, runs // common, place_offsets)
