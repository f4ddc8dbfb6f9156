"""Events, metrics and explanations where several processes use one pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.errors import AttachError, OwnerGoneError
from kvstore.events import Hit, Missed, MissReason, Stored
from kvstore.spec import ChunkGrid
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.specs import hybrid, put_all
from tests.attached.driver import socket_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = hybrid(16)
IDS = list(range(100))
DEADLINE_S = 60.0


@pytest.fixture
def path() -> Iterator[str]:
    with leaves_nothing(), socket_folder() as folder:
        yield f"{folder}/pool.sock"


def write(store: kvstore.Store, resume_at: tuple[int, ...]) -> None:
    with store.write(IDS, resume_at=resume_at, grid=ChunkGrid.every(32, upto=100)) as writer:
        put_all(writer)
        writer.commit()


def test_the_owner_hears_of_everybody(path: str) -> None:
    with (
        kvstore.open(SPEC, dram="32MiB", socket=path) as store,
        kvstore.attach(path, deadline_s=DEADLINE_S) as attached,
        store.events() as stream,
        attached.events(kinds=(Hit, Missed)) as own,
    ):
        write(attached, (32, 64))
        stored = stream.next(DEADLINE_S)
        assert isinstance(stored, Stored)
        assert set(stored.keys) == set(store.prompt(IDS).path.keys)
        match = attached.match(IDS)
        for listener in (stream, own):
            hit, missed = listener.next(DEADLINE_S), listener.next(DEADLINE_S)
            assert isinstance(hit, Hit)
            assert (hit.tokens, hit.tier, hit.size_bytes) == (64, "dram", match.candidates[0].size_bytes)
            assert isinstance(missed, Missed)
            assert (missed.matched_tokens, missed.reason) == (64, MissReason.NO_CHECKPOINT)
        assert match.missing.reason is MissReason.NO_CHECKPOINT
        store.match(IDS)
        assert not own.take(), "an attached process is told of its own matches"
        assert (store.metrics().matches, attached.metrics().matches) == (2, 1)
        assert attached.metrics().hits == {"dram": 1}
        assert attached.metrics().pool.stored_bytes == store.statistics().stored_bytes > 0
        assert attached.metrics().commit_s.count == 1


def test_what_an_attached_process_is_not_told(path: str) -> None:
    with (
        kvstore.open(SPEC, dram="32MiB", socket=path),
        kvstore.attach(path, deadline_s=DEADLINE_S) as attached,
        pytest.raises(AttachError, match=r"in the process that opened the store, or only kinds=\(Hit, Missed\)"),
    ):
        attached.events()


def test_an_attached_process_explains_as_its_owner_does(path: str) -> None:
    with (
        kvstore.open(SPEC, dram="32MiB", socket=path) as store,
        kvstore.attach(path, deadline_s=DEADLINE_S) as attached,
    ):
        write(store, (32, 64))
        store.pool.evict(store.prompt(IDS).path.key(3), states_only=True)
        for grid in (None, ChunkGrid.every(32, upto=100), ChunkGrid.every(16, upto=100)):
            explanation = attached.explain(IDS, grid=grid)
            assert explanation == store.explain(IDS, grid=grid)
            assert str(explanation) == str(store.explain(IDS, grid=grid))
        assert attached.explain(IDS).tiers[0].evicted_state_tokens == 64
        store.close()
        with pytest.raises(OwnerGoneError):
            attached.explain(IDS)
