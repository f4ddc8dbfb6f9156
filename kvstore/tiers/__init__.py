"""Places where records lie."""

from kvstore.tiers.dram import DramTier

__all__ = ["DramTier"]
