"""The seams: what an outsider implements to add a tier, a codec, a policy or a transport.

Nothing else lives here. Each seam has a conformance kit in `kvstore.testing`.
"""

from kvstore.abc.codec import Codec
from kvstore.abc.files import FileBatch, FileOperation, Files
from kvstore.abc.policy import CheckpointPolicy, Evictable, EvictionPolicy
from kvstore.abc.tier import Slot, SlotRows, SlotViews, Tier
from kvstore.abc.transport import Availability, Connection, ConnectionInformation, Listener, Transport, TransportOptions

__all__ = [
    "Availability",
    "CheckpointPolicy",
    "Codec",
    "Connection",
    "ConnectionInformation",
    "Evictable",
    "EvictionPolicy",
    "FileBatch",
    "FileOperation",
    "Files",
    "Listener",
    "Slot",
    "SlotRows",
    "SlotViews",
    "Tier",
    "Transport",
    "TransportOptions",
]
