"""Places where records lie."""

from kvstore.tiers.arena import ArenaTier, HugePages

__all__ = ["ArenaTier", "HugePages"]
