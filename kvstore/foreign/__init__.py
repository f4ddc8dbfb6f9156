"""Opaque objects under an engine's own keys: for engines that show only hashes of their blocks (docs/foreign.md)."""

from kvstore.foreign.holding import ForeignHold
from kvstore.foreign.namespace import ForeignNamespace
from kvstore.foreign.regions import Region
from kvstore.foreign.statistics import ForeignStatistics
from kvstore.foreign.store import ForeignStore

__all__ = ["ForeignHold", "ForeignNamespace", "ForeignStatistics", "ForeignStore", "Region"]
