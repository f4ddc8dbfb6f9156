"""What all transfers that leave a node share: whose turn it is, and what is known of the links."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore._native import Traffic
from kvstore.transfer.telemetry import LinkTable


@dataclass(frozen=True, eq=False)
class Egress:
    """Shared by a store's sender and by those of its endpoints that serve.

    Attributes:
        traffic: decides before each frame which transfer goes first.
        links: the peers that bytes leave to.
    """

    traffic: Traffic = field(default_factory=Traffic)
    links: LinkTable = field(default_factory=LinkTable)
