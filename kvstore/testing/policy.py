"""Conformance kits for eviction and checkpoint policies.

Test modules of the implementer's own:

    class TestMine(EvictionConformance):
        def make(self):
            return MyPolicy()

    class TestMyCheckpoints(CheckpointConformance):
        def make(self):
            return MyCheckpoints()

What a policy ranks first is its own business; that it neither loses nor invents anything is the kit's.
"""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from typing import TYPE_CHECKING

import pytest

from kvstore.abc import Evictable
from kvstore.limits import CHECKPOINTS_PER_WRITE_MAX
from kvstore.store import open_store
from kvstore.testing.specs import check_lease, hybrid, put_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.abc import CheckpointPolicy, EvictionPolicy


def item(number: int, *, is_state: bool = False, size_bytes: int = 4096) -> Evictable:
    """An evictable of its own key."""
    return Evictable(number.to_bytes(32, "big"), is_state, size_bytes, 16 * (number + 1))


def names(items: Iterable[Evictable]) -> list[tuple[bytes, bool]]:
    return [(each.key, each.is_state) for each in items]


class EvictionConformance:
    """The cases for an eviction policy; the pool keeps the promises that `EvictionPolicy` lists, and so do they."""

    @abstractmethod
    def make(self) -> EvictionPolicy:
        """A new policy that knows of nothing."""

    def test_begins_empty(self) -> None:
        assert list(self.make().ranked()) == []

    def test_every_item_is_ranked_once(self) -> None:
        policy = self.make()
        items = [item(number, is_state=number % 3 == 0) for number in range(50)]
        for each in items:
            policy.insert(each)
        ranked = list(policy.ranked())
        assert len(ranked) == len(items)
        assert set(ranked) == set(items)

    def test_attention_and_states_of_one_node_differ(self) -> None:
        policy = self.make()
        attention, states = item(1), item(1, is_state=True)
        policy.insert(attention)
        policy.insert(states)
        policy.remove(attention)
        assert list(policy.ranked()) == [states]

    def test_a_removed_item_is_gone_and_may_come_back_larger(self) -> None:
        policy = self.make()
        for number in range(5):
            policy.insert(item(number))
        policy.remove(item(2))
        assert item(2) not in list(policy.ranked())
        policy.insert(item(2, size_bytes=8192))
        assert item(2, size_bytes=8192) in list(policy.ranked())
        assert len(list(policy.ranked())) == 5

    def test_ranking_changes_nothing(self) -> None:
        policy = self.make()
        for number in range(20):
            policy.insert(item(number))
        policy.access(item(7))
        first = list(policy.ranked())
        assert names(itertools.islice(policy.ranked(), 3)) == names(first[:3])
        assert list(policy.ranked()) == first

    def test_ranked_may_be_left_unfinished(self) -> None:
        """The pool stops where it has enough, and then removes what it took."""
        policy = self.make()
        for number in range(20):
            policy.insert(item(number))
        ranked = policy.ranked()
        taken = [next(ranked) for _ in range(5)]
        del ranked
        for each in taken:
            policy.remove(each)
        assert set(policy.ranked()) == {item(number) for number in range(20)} - set(taken)

    @pytest.mark.parametrize("seed", range(5))
    def test_any_history(self, seed: int) -> None:
        """Never loses or invents an item; the same history gives the same ranking."""
        policy, twin = self.make(), self.make()
        source = random.Random(seed)
        live: list[Evictable] = []
        for _ in range(400):
            action = source.random()
            if action < 0.45 or not live:
                each = item(source.randrange(1 << 40), is_state=source.random() < 0.5)
                live.append(each)
                policy.insert(each)
                twin.insert(each)
            elif action < 0.75:
                each = source.choice(live)
                policy.access(each)
                twin.access(each)
            else:
                each = live.pop(source.randrange(len(live)))
                policy.remove(each)
                twin.remove(each)
            if source.random() < 0.1:
                ranked = list(policy.ranked())
                assert len(ranked) == len(live)
                assert set(ranked) == set(live)
                assert list(twin.ranked()) == ranked

    def test_a_full_store_goes_on(self) -> None:
        """A small store under this policy takes prompt after prompt, and what it still has is right."""
        source = random.Random(0)
        with open_store(hybrid(4), dram=200 << 10, eviction=self.make()) as store:
            shared = [source.randrange(100) for _ in range(9)]
            for number in range(60):
                ids = [*shared[: source.randrange(10)], *(source.randrange(100) for _ in range(source.randrange(1, 9)))]
                prompt = store.prompt(ids)
                with store.write(prompt) as writer:
                    put_all(writer)
                    writer.commit()
                match = store.match([*ids, 0])
                assert match.tokens == len(ids), f"prompt {number} was evicted by its own commit"
                with store.read(match) as lease:
                    check_lease(lease, prompt)
                store.pool.check()
            assert store.statistics().evicted_records > 0


class CheckpointConformance:
    """The cases for a checkpoint policy."""

    @abstractmethod
    def make(self) -> CheckpointPolicy:
        """A new policy."""

    @pytest.mark.parametrize("block_tokens", [1, 16, 64])
    @pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 64, 65, 5000, 131072])
    def test_lengths_that_a_writer_takes(self, prompt_tokens: int, block_tokens: int) -> None:
        last = prompt_tokens // block_tokens * block_tokens
        for resume_tokens in sorted({0, 1, last // 2, max(0, prompt_tokens - 1)}):
            for count in (0, 1, 5, 1000):
                step = max(block_tokens, last // (count + 1) // block_tokens * block_tokens)
                branch_points = [] if count == 0 else list(range(step, last + 1, step))[:count]
                lengths = self.make().suggest(prompt_tokens, resume_tokens, branch_points, block_tokens)
                assert list(lengths) == sorted(set(lengths)), "not ascending, or repeated"
                assert len(lengths) <= CHECKPOINTS_PER_WRITE_MAX
                for length in lengths:
                    assert resume_tokens < length <= prompt_tokens
                    assert length % block_tokens == 0 or length == prompt_tokens, "no state can be stored there"

    def test_the_same_question_has_the_same_answer(self) -> None:
        policy = self.make()
        answers = {tuple(policy.suggest(10_000, 64, [128, 4096], 64)) for _ in range(3)}
        assert len(answers) == 1

    def test_a_store_works_with_it(self) -> None:
        with open_store(hybrid(4), dram=4 << 20, checkpoints=self.make()) as store:
            for length in (3, 4, 17, 40):
                ids = [1] * length
                match = store.match(ids)
                if match.suggested:
                    with store.write(ids, resume_at=match.suggested) as writer:
                        put_all(writer)
                        writer.commit()
                    assert store.match([*ids, 0]).tokens >= max(match.suggested)
