"""Watching a store: events, numbers, and why a prompt resumes where it does: `python examples/10_watch_a_store.py`.

A router could follow the events like `Mirror` below, to know which prefixes this process holds. The store is so small
that the second prompt evicts parts of the first one.
"""

from __future__ import annotations

import numpy as np

import kvstore
from kvstore.events import Event, Hit, Missed, Removed, Stored
from kvstore.spec import CacheGroup, DType, ReuseRule, Segment, TensorSpec

HEADS, DIM, BLOCK_TOKENS, TOKENS = 2, 64, 16, 640
LAYER, STATE_LAYER = 0, 1

heads = (Segment("heads", units=HEADS, unit_rows=1),)
attention = CacheGroup(
    "attention",
    ReuseRule.ATTENTION,
    layers=(LAYER,),
    tensors=tuple(TensorSpec(name, DType.FLOAT32, heads, (DIM,), has_tokens=True) for name in ("keys", "values")),
)
state = CacheGroup(
    "state", ReuseRule.STATE, (STATE_LAYER,), (TensorSpec("recurrent", DType.FLOAT32, heads, (DIM, DIM), False),)
)
spec = kvstore.ModelSpec("example", weights="seed 0", block_tokens=BLOCK_TOKENS, groups=(attention, state))


class Mirror:
    """Which blocks a store holds, from its events alone: attention and states of a prefix are two blocks."""

    def __init__(self, contents: tuple[Stored, ...]) -> None:
        self.blocks: set[tuple[bytes, bool]] = set()
        self.follow(contents)

    def follow(self, events: list[Event] | tuple[Stored, ...]) -> None:
        for event in events:
            if isinstance(event, Stored):
                self.blocks |= {(block.key, block.is_state) for block in event.blocks}
            elif isinstance(event, Removed):
                self.blocks -= {(block.key, block.is_state) for block in event.blocks}


def write(store: kvstore.Store, token_ids: list[int]) -> None:
    """Store a prompt's cache, with states in its middle and at its end."""
    half, whole = len(token_ids) // 2, len(token_ids)
    with store.write(token_ids, resume_at=(half, whole)) as writer:
        values = np.zeros((HEADS, whole, DIM), np.float32)
        writer.put(LAYER, tokens=slice(0, whole), keys=values, values=values)
        for at in (half, whole):
            writer.put_state(STATE_LAYER, at=at, recurrent=np.zeros((HEADS, DIM, DIM), np.float32))
        writer.commit()


first = list(range(TOKENS))
second = list(range(5000, 5000 + TOKENS))

with kvstore.open(spec, dram="1300KiB") as store:
    write(store, first)
    with store.events(contents=True) as stream:  # in a program, a thread would follow: for event in stream.each(60.0)
        mirror = Mirror(stream.contents)
        print(f"{len(mirror.blocks)} blocks were there")

        store.match([*first, 1])
        write(store, second)
        store.match([*first, 1])

        events = stream.take()
        for event in events:
            match event:
                case Stored():
                    print(f"stored {len(event.blocks)} blocks, {event.size_bytes} bytes, up to {event.tokens} tokens")
                case Removed():
                    print(f"removed {len(event.blocks)} blocks from {event.tier}: {event.why}")
                case Hit():
                    print(f"hit: {event.tokens} of {event.asked_tokens} tokens in {event.tier}")
                case Missed():
                    print(f"missed: {event.matched_tokens} of {event.asked_tokens} tokens, {event.reason}")
        mirror.follow(events)
        assert stream.dropped == 0

    present = {key for key, _ in mirror.blocks}
    print(f"the mirror holds {len(mirror.blocks)} blocks")
    assert set(store.prompt(second).path.keys) <= present

    metrics = store.metrics()
    print(f"{metrics.matches} matches found {sum(metrics.hit_tokens.values())} of {metrics.asked_tokens} tokens")
    print(f"missed: {dict(metrics.missed)}")
    print(store.explain([*first, 1]))
