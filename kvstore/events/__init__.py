"""What happens in a store, as a stream of values (docs/observability.md).

with store.events() as stream:
    for event in stream.each(deadline_s=60.0):
        if isinstance(event, Stored):
            router.add(event.keys)
"""

from kvstore.events.changes import Block, Changes, Tell
from kvstore.events.stream import EventStream
from kvstore.events.values import EVENT_KINDS, Event, Hit, Missed, Removed, Stored
from kvstore.events.why import MissReason, RemovedWhy

__all__ = [
    "EVENT_KINDS",
    "Block",
    "Changes",
    "Event",
    "EventStream",
    "Hit",
    "MissReason",
    "Missed",
    "Removed",
    "RemovedWhy",
    "Stored",
    "Tell",
]
