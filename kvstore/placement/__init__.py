"""Where records are, over all tiers, and moving them between tiers."""

from kvstore.placement.shelf import Shelf, ShelfHold, ShelfLoad, ShelfStatistics

__all__ = ["Shelf", "ShelfHold", "ShelfLoad", "ShelfStatistics"]
