"""Events, metrics and explanations of a pool with another tier beside its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.events import EventStream, Hit, Removed, Stored
from kvstore.placement.tiered import TieredPool
from kvstore.store import Store, open_store
from kvstore.testing.memory_shelf import MemoryShelf
from kvstore.testing.specs import hybrid, put_all
from kvstore.tiers import ArenaTier
from tests.attached.driver import eventually

if TYPE_CHECKING:
    from pathlib import Path

IDS = list(range(40))


def test_what_lies_in_another_tier_is_told_counted_and_explained() -> None:
    spec = hybrid(4)
    shelf = MemoryShelf(spec, capacity_bytes=4 << 20)
    pool = TieredPool(spec, ArenaTier(4 << 20), [shelf])
    with Store(pool) as store, store.events() as stream:
        with store.write(IDS, resume_at=(16, 40)) as writer:
            put_all(writer)
            writer.commit()
        kept_tokens = 0
        while kept_tokens < len(IDS):  # checkpoints are kept one after the other, behind the writer's back
            event = stream.next(30.0)
            if isinstance(event, Stored) and event.tier == shelf.name:
                kept_tokens = event.tokens
        key = store.prompt(IDS).path.key
        eventually(lambda: pool.evict_here(key(0)) > 0)  # the keeper may still hold it
        stream.take()
        assert store.match([*IDS, 1]).tier == shelf.name
        (hit,) = (event for event in stream.take() if not isinstance(event, Stored))
        assert isinstance(hit, Hit)
        assert (hit.tier, hit.tokens) == (shelf.name, 40)
        explanation = store.explain([*IDS, 1])
        assert (explanation.tokens, explanation.tier) == (40, shelf.name)
        assert [tier.name for tier in explanation.tiers] == ["dram", shelf.name]
        assert [tier.tokens for tier in explanation.tiers] == [0, 40]
        metrics = store.metrics()
        assert metrics.hits == {shelf.name: 1}
        assert [each.name for each in metrics.shelves] == [shelf.name]
        assert metrics.shelves[0].kept_bytes > 0
    with open_store(spec, dram="4MiB") as plain:
        assert plain.metrics().shelves == ()


def stored_tokens(stream: EventStream, tier: str) -> int:
    return max((event.tokens for event in stream.take() if isinstance(event, Stored) and event.tier == tier), default=0)


def test_a_tier_on_disk_tells_what_it_keeps_what_it_had_and_that_it_closes(tmp_path: Path) -> None:
    spec = hybrid(4)
    for is_there in (False, True):
        with open_store(spec, dram="4MiB", ssd=f"{tmp_path / 'ssd'}:64MiB") as store:
            stream = store.events(kinds=(Stored, Removed), contents=True)
            known = {(event.tier, key) for event in stream.contents for key in event.keys}
            keys = {("ssd", key) for key in store.prompt(IDS).path.keys}
            assert (known >= keys) == is_there
            if not is_there:
                with store.write(IDS, resume_at=(16, 40)) as writer:
                    put_all(writer)
                    writer.commit()
                store.flush()
                assert stored_tokens(stream, "ssd") == len(IDS)
        closed = {event.tier for event in stream.take() if isinstance(event, Removed) and event.why == "closed"}
        assert closed == ({"ssd"} if is_there else {"ssd", "dram"})
