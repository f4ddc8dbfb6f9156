"""Our own transfers: from `send` to the acknowledged commit, checksums verified on arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.bench.sides.side import ReceivingHalf, SendingHalf, Side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.bench.load import Load


@dataclass(frozen=True)
class OurSide(Side):
    """kvstore, in one of its variants.

    Attributes:
        label: what the table calls it.
    """

    label: str = "kvstore"

    @property
    def name(self) -> str:
        return self.label

    def missing(self) -> str | None:
        return None

    def needs_bytes(self, load: Load) -> int:
        return load.pool_bytes

    def receiving(self, load: Load, tools: Mapping[str, str]) -> ReceivingHalf:
        from kvstore.bench.sides.our_halves import OurReceiver

        return OurReceiver(load)

    def sending(self, load: Load, tools: Mapping[str, str]) -> SendingHalf:
        from kvstore.bench.sides.our_halves import OurSender

        return OurSender(load)


OUR_VARIANTS: tuple[OurSide, ...] = (OurSide(),)
"""The first is what the others, and all baselines, are compared with."""
