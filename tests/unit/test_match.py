"""What a match returns, and why nothing deeper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvstore.errors import LeaseError, LeaseGoneError
from kvstore.keys import ExtraInput
from kvstore.pool import LadderCheckpoints
from kvstore.spec import ChunkGrid, ModelSpec, Shard
from kvstore.store import Store, open_store
from kvstore.testing.specs import check_lease, dense, hybrid, latent, pure_state, put_all, put_states, put_tokens, spans

B = 16


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * number + seed) % 1000 for number in range(length)]


def write(store: Store, ids: list[int], resume_at: tuple[int, ...] | None = None, **identity: object) -> None:
    with store.write(ids, resume_at=resume_at, **identity) as writer:  # type: ignore[arg-type]
        put_all(writer)
        writer.commit()


@pytest.mark.parametrize("make", [dense, hybrid, pure_state, latent], ids=lambda make: make.__name__)
@pytest.mark.parametrize("length", [1, B - 1, B, B + 1, 3 * B, 3 * B + 5])
def test_an_engine_computes_at_least_one_token(make: type[ModelSpec], length: int) -> None:
    ids = ids_of(length)
    with open_store(make(B), dram="8MiB") as store:
        write(store, ids, (length,))
        assert store.match([*ids, 1]).tokens == length
        match = store.match(ids)
        assert match.missing.cap_tokens == length - 1
        assert match.tokens == ((length - 1) // B * B if make is dense else 0)
        assert all(candidate.tokens < length for candidate in match.candidates)


def test_candidates_deepest_first_with_what_they_cost() -> None:
    ids = ids_of(70)
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, ids, (16, 48, 70))
        match = store.match([*ids, 1])
        assert [candidate.tokens for candidate in match.candidates] == [70, 48, 16]
        assert (bool(match), match.tier) == (True, "dram")
        best = match.candidates[0]
        assert best.bytes_by_group == {
            "attention": 2 * 2 * 70 * 2 * 16,
            "state": 2 * (16 * 6 + 4 * 24),
            "window": 2 * 2 * 7 * 8,
        }
        assert match.candidates[2].bytes_by_group["attention"] == 2 * 2 * 16 * 2 * 16
        assert match.at(48).tokens == 48
        with pytest.raises(ValueError, match="70, 48, 16"):
            match.at(32)
        for candidate in match.candidates:
            with store.read(match.at(candidate.tokens)) as lease:
                assert lease.tokens == candidate.tokens
                check_lease(lease, store.prompt(ids))
        assert store.match([*ids, 1]).expected_load_s is not None


def test_several_spans() -> None:
    ids = ids_of(5)
    with open_store(spans(2), dram="64MiB") as store:
        write(store, ids)
        with store.read(store.match([*ids, 1]), verify=True) as lease:
            assert lease.tokens == 5
            check_lease(lease, store.prompt(ids))


def test_a_state_of_another_length_never_appears() -> None:
    """Attention of 80 tokens and a state at 64: what can be restored is 64."""
    ids = ids_of(80)
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, ids, (64,))
        match = store.match([*ids, 1])
        assert match.tokens == 64
        assert match.missing.attention_tokens == 80
        assert any("between 64 and 80" in reason for reason in match.missing.reasons)
        # Past the state, and before it, nothing is usable although attention is.
        assert store.match([*ids[:70], 9_999]).tokens == 64
        assert not store.match([*ids[:63], 9_999])


def test_the_reasons_name_what_is_missing() -> None:
    ids = ids_of(80)
    with open_store(hybrid(B), dram="8MiB") as store:
        assert store.match(ids).missing.reasons[-1] == "no complete states are stored"
        write(store, ids, (32, 64))
        store.pool.evict(store.prompt(ids).path.key(3), states_only=True)
        reasons = store.match(ids).missing.reasons
        assert "the states at 64 were evicted" in reasons
        assert "the next complete states are at 32" in reasons
        assert "computes at least one token" in store.match(ids[:33]).missing.reasons[0]
        with store.write(ids, salt=b"half", resume_at=(64,), shard=Shard(0, 2)) as writer:
            put_all(writer)
            writer.commit()
        half = store.match(ids, salt=b"half")
        assert (half.tokens, half.missing.attention_tokens) == (0, 0)
        assert store.match(ids, salt=b"half", shard=Shard(0, 2)).tokens == 64


def test_a_tail_needs_the_same_ids() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, ids, (32, 40))
        assert store.match([*ids, 1, 2, 3]).tokens == 40
        assert store.match([*ids[:39], 9_999, 1, 2]).tokens == 32
        assert store.match([*ids[:35], 1]).tokens == 32
        assert store.match(ids).tokens == 32


def test_a_tail_needs_the_same_extras() -> None:
    ids = ids_of(40)
    picture, other = ExtraInput(36, b"a picture"), ExtraInput(36, b"another")
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, ids, (32, 40), extras=[picture])
        more = [*ids, 1, 2]
        assert store.match(more, extras=[picture]).tokens == 40
        assert store.match(more, extras=[other]).tokens == 32
        assert store.match(more).tokens == 32
        assert store.match(more, extras=[ExtraInput(35, b"a picture")]).tokens == 32
        assert store.match(more, extras=[picture, ExtraInput(3, b"early")]).tokens == 0
        assert store.match(more, extras=[picture, ExtraInput(41, b"late")]).tokens == 40


def test_many_tails_on_one_node() -> None:
    """More than could be compared one by one; the prompt's own keys find the right one."""
    with open_store(hybrid(4), dram="8MiB") as store:
        for number in range(60):
            write(store, [1, 2, 3, 4, number, 5], (6,))
            write(store, [number + 100, 7], (2,))
        for number in range(60):
            match = store.match([1, 2, 3, 4, number, 5, 6, 7])
            assert match.tokens == 6
            assert store.match([1, 2, 3, 4, number, 6, 6, 7]).tokens == 0
            assert store.match([number + 100, 7, 9, 9]).tokens == 2
            with store.read(match) as lease:
                check_lease(lease, store.prompt([1, 2, 3, 4, number, 5]))


def test_salts_adapters_and_weights_are_apart() -> None:
    ids = ids_of(40)
    spec = hybrid(B)
    with open_store(spec, dram="8MiB") as store:
        write(store, ids, salt=b"a", adapter="x")
        more = [*ids, 1]
        assert store.match(more, salt=b"a", adapter="x").tokens == 40
        for identity in ({}, {"salt": b"a"}, {"adapter": "x"}, {"salt": b"b", "adapter": "x"}, {"salt": b"ax"}):
            assert not store.match(more, **identity), identity  # type: ignore[arg-type]
        assert store.statistics().bytes_by_salt == {b"a": store.statistics().committed_bytes}
        match = store.match(more, salt=b"a", adapter="x")
        with open_store(hybrid(B, weights="seed 1"), dram="8MiB") as other:
            write(other, ids, salt=b"a", adapter="x")
            assert other.prompt(ids).path.root != store.prompt(ids).path.root
            with pytest.raises(LeaseGoneError):
                other.read(match)


def test_a_writer_in_progress_is_pending_and_never_a_hit() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="8MiB") as store, store.write(ids, resume_at=(32, 40)) as writer:
        more = [*ids, 1]
        assert (store.match(more).tokens, store.match(more).pending_tokens) == (0, 40)
        assert store.match(ids).pending_tokens == 32
        assert store.match([*ids[:39], 9_999, 1]).pending_tokens == 32
        assert store.match(more, salt=b"other").pending_tokens == 0
        put_tokens(writer, 0, 40)
        put_states(writer, 32)
        assert not store.match(more)
        writer.commit(32)
        assert (store.match(more).tokens, store.match(more).pending_tokens) == (32, 40)
        assert (store.match(ids).tokens, store.match(ids).pending_tokens) == (32, 0)
        put_states(writer, 40)
        writer.commit()
        assert (store.match(more).tokens, store.match(more).pending_tokens) == (40, 0)


def test_pending_ends_with_its_writer() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="8MiB") as store:
        with store.write(ids):
            assert store.match([*ids, 1]).pending_tokens == 40
        assert store.match([*ids, 1]).pending_tokens == 0


def test_a_strict_grid_never_mixes() -> None:
    ids = ids_of(64)
    fine, coarse = ChunkGrid.every(16, upto=64), ChunkGrid.every(32, upto=64)
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, ids, (32,), grid=fine)
        assert store.match(ids).tokens == 32
        assert store.match(ids, grid=fine).tokens == 32
        assert store.match(ids, grid=coarse).tokens == 0
        # The same tokens on the other grid stand beside the first.
        write(store, ids, (32, 64), grid=coarse)
        assert store.match([*ids, 1], grid=ChunkGrid.every(32, upto=65)).tokens == 64
        assert store.match([*ids, 1], grid=ChunkGrid.every(16, upto=65)).tokens == 32
        for grid in (fine, coarse):
            with store.read(store.match(ids, grid=grid)) as lease:
                closing = [grid.closing(held.header.end_tokens) for held in lease.records]
                assert [held.header.grid for held in lease.records] == [grid.digest_at(end or 0) for end in closing]
        store.pool.check()


def test_a_grid_that_nobody_named_satisfies_no_strict_reader() -> None:
    ids = ids_of(32)
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, ids, (16,))
        assert store.match(ids).tokens == 16
        assert not store.match(ids, grid=ChunkGrid.every(16, upto=32))


def test_the_chunk_that_a_block_was_computed_in_counts() -> None:
    """Blocks before a common boundary differ where the chunks that they lie in end differently."""
    ids = ids_of(64)
    written = ChunkGrid((16, 48, 64))
    with open_store(dense(B), dram="8MiB") as store:
        write(store, ids, (), grid=written)
        assert store.match(ids, grid=ChunkGrid((16, 48, 64))).tokens == 48
        assert store.match(ids, grid=ChunkGrid((16, 32, 48, 64))).tokens == 16
        assert store.match(ids, grid=ChunkGrid((16, 64))).tokens == 16


def test_shards_join_and_split() -> None:
    ids = ids_of(40)
    for make in (dense, hybrid, pure_state, latent):
        with open_store(make(B), dram="8MiB") as store:
            for order, salt in (((0, 1), b"up"), ((1, 0), b"down")):
                for index in order:
                    with store.write(ids, salt=salt, shard=Shard(index, 2)) as writer:
                        put_all(writer)
                        writer.commit()
                    store.pool.check()
                for shard in (Shard(0, 1), Shard(0, 2), Shard(1, 2)):
                    with store.read(store.match([*ids, 1], salt=salt, shard=shard), verify=True) as lease:
                        assert lease.tokens == 40
                        check_lease(lease, store.prompt(ids, salt=salt))
            write(store, ids, salt=b"whole")
            for index in range(2):
                match = store.match([*ids, 1], salt=b"whole", shard=Shard(index, 2))
                with store.read(match) as lease:
                    check_lease(lease, store.prompt(ids, salt=b"whole"))


def test_a_miss_cannot_be_read() -> None:
    with open_store(dense(B), dram="8MiB") as store:
        with pytest.raises(LeaseError, match="if match:"):
            store.read(store.match([1, 2, 3]))
        assert not store.match([1]).candidates


def test_counters() -> None:
    ids = ids_of(40)
    with open_store(dense(B), dram="8MiB") as store:
        store.match(ids)
        write(store, ids)
        store.match([*ids, 1])
        statistics = store.statistics()
        assert (statistics.matches, statistics.hits, statistics.commits) == (2, 1, 1)


def test_what_nobody_looks_at_is_not_computed() -> None:
    """And what is computed later is as if it had been at once."""

    class Counting(LadderCheckpoints):
        asked = 0

        def suggest(self, *arguments: Any) -> tuple[int, ...]:
            Counting.asked += 1
            return super().suggest(*arguments)

    ids = ids_of(70)
    with open_store(hybrid(B), dram="8MiB", checkpoints=Counting()) as store:
        write(store, ids, (16, 48, 70))
        match = store.match([*ids, 1])
        assert match
        assert (match.tokens, match.pending_tokens, Counting.asked) == (70, 0, 0)
        assert not {"candidates", "missing", "suggested"} & match.__dict__.keys()
        again = store.match([*ids, 1])
        store.pool.evict(store.prompt(ids).path.key(0))
        assert match == again
        assert [candidate.tokens for candidate in match.candidates] == [70, 48, 16]
        assert match.suggested == again.suggested
        assert Counting.asked == 2
        assert match.candidates is match.candidates
        assert replace(match, tokens=48).candidates == match.candidates
        assert match.candidates[1].path == store.prompt(ids).path.prefix(3)
        with pytest.raises(AttributeError, match="candidate_s"):
            _ = match.candidate_s
