"""Moving tensors between an engine's pages and packed memory on their own device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.tiers.gpu.layout import TensorPages
    from kvstore.tiers.gpu.packing import Packing, PagePlaces


@dataclass(frozen=True, eq=False)
class LayerPages:
    """One tensor of one layer where it lies.

    Attributes:
        pages: its shape and strides.
        words: a torch tensor over the engine's memory, `[pages, rows, places, *inner]`, of integers as wide as the
            elements: bytes are moved, and no number is looked at.
    """

    pages: TensorPages
    words: Any


class PageGather(ABC):
    """Copies on the device, in the order of the stream that is current. Any thread.

    The same bytes come out of every implementation; `kvstore.testing.pages` has what they are checked with.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """`triton`, `native` or `index`."""

    @abstractmethod
    def pack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        """Copy tokens of pages into images, zeros where there is none.

        Args:
            layers: one for each of `packing.layers`.
            places: of all images, one after the other.
            packed: a torch tensor of bytes, `[n]`, on the same device.
        """

    @abstractmethod
    def unpack(self, layers: Sequence[LayerPages], packing: Packing, places: PagePlaces, packed: Any) -> None:
        """Copy the tokens of images into pages; what has no place stays where it is. No place is named twice."""
