"""The store: match, read, write, hand over."""

from kvstore.store.lease import LayerView, Lease
from kvstore.store.opening import attach_store, open_store
from kvstore.store.store import Arrival, Store
from kvstore.store.writer import WriteListener, Writer

__all__ = ["Arrival", "LayerView", "Lease", "Store", "WriteListener", "Writer", "attach_store", "open_store"]
