"""Where a prompt's states are suggested, by the default policy and by a match."""

from __future__ import annotations

from kvstore.limits import CHECKPOINTS_PER_WRITE_MAX
from kvstore.pool import LadderCheckpoints
from kvstore.spec import ChunkGrid
from kvstore.store import open_store
from kvstore.testing.specs import hybrid, put_all


def test_a_rung_at_no_less_than_half_of_any_shared_prefix() -> None:
    prompt_tokens = 100_000
    lengths = LadderCheckpoints(rungs_max=20, rung_tokens_min=64).suggest(prompt_tokens, 0, [], 64)
    for shared in range(256, prompt_tokens, 997):
        usable = max((length for length in lengths if length <= shared), default=0)
        assert usable >= shared / 2 - 64


def test_at_most_as_many_as_a_writer_takes_and_the_deepest_of_them() -> None:
    lengths = LadderCheckpoints().suggest(64 * 500, 0, range(64, 64 * 500, 64), 64)
    assert len(lengths) == CHECKPOINTS_PER_WRITE_MAX
    assert lengths[-1] == 64 * 500


def test_short_prompts_have_their_end() -> None:
    assert LadderCheckpoints().suggest(5, 0, [], 64) == (5,)
    assert LadderCheckpoints().suggest(5, 5, [], 64) == ()


def test_a_branch_point_is_suggested_to_the_second_prompt() -> None:
    """Before it computes through it, and also when nothing but ghosts remember the first."""
    shared, one, other = [1] * 32, [2] * 16, [3] * 16
    for is_evicted in (False, True):
        with open_store(hybrid(16), dram="4MiB") as store:
            with store.write([*shared, *one]) as writer:
                put_all(writer)
                writer.commit()
            if is_evicted:
                store.pool.evict(store.prompt(shared[:16]).path.key(0))
                assert store.statistics().committed_bytes == 0
            match = store.match([*shared, *other])
            assert not match, "there is no state where the prompts part"
            assert match.suggested == (32, 48)
            # Its own path goes on from there: no branch is seen where nobody left it.
            assert store.match([*shared, *one]).suggested == (48,)


def test_suggestions_lie_on_the_readers_grid() -> None:
    shared, one, other = [1] * 48, [2] * 16, [3] * 30
    grid = ChunkGrid.every(32, upto=78)
    with open_store(hybrid(16), dram="4MiB") as store:
        with store.write([*shared, *one]) as writer:
            put_all(writer)
            writer.commit()
        ids = [*shared, *other]
        assert store.match(ids).suggested == (48, 78)
        match = store.match(ids, grid=grid)
        assert match.suggested == (32, 78)
        with store.write(ids, resume_at=match.suggested, grid=grid) as writer:
            put_all(writer)
            writer.commit()
        assert store.match([*ids, 0]).tokens == 78
