"""Policies against the kits, and the kits against policies: each defect must fail the case named beside it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from kvstore.abc import CheckpointPolicy, Evictable, EvictionPolicy
from kvstore.pool import LadderCheckpoints, LRUPolicy
from kvstore.testing.policy import CheckpointConformance, EvictionConformance, item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class TestLRU(EvictionConformance):
    def make(self) -> EvictionPolicy:
        return LRUPolicy()

    def test_least_recently_used_first(self) -> None:
        policy = self.make()
        for number in range(4):
            policy.insert(item(number))
        policy.access(item(1))
        policy.access(item(0))
        assert list(policy.ranked()) == [item(2), item(3), item(1), item(0)]


class FIFO(EvictionPolicy):
    """First in, first out: hits do not count."""

    def __init__(self) -> None:
        self.items: list[Evictable] = []

    def insert(self, item: Evictable) -> None:
        self.items.append(item)

    def access(self, item: Evictable) -> None:
        pass

    def remove(self, item: Evictable) -> None:
        self.items = [each for each in self.items if (each.key, each.is_state) != (item.key, item.is_state)]

    def ranked(self) -> Iterator[Evictable]:
        return iter(tuple(self.items))


class TestFIFO(EvictionConformance):
    def make(self) -> EvictionPolicy:
        return FIFO()


class ConfusesStates(FIFO):
    def remove(self, item: Evictable) -> None:
        self.items = [each for each in self.items if each.key != item.key]


class ForgetsOnAccess(FIFO):
    def access(self, item: Evictable) -> None:
        self.remove(item)


class RanksTwice(FIFO):
    def access(self, item: Evictable) -> None:
        self.items.append(item)


class NeverRemoves(FIFO):
    def remove(self, item: Evictable) -> None:
        pass


class RanksAtRandom(FIFO):
    def ranked(self) -> Iterator[Evictable]:
        random.shuffle(self.items)
        return super().ranked()


class ConsumesWhatItRanks(FIFO):
    def ranked(self) -> Iterator[Evictable]:
        while self.items:
            yield self.items.pop(0)


@pytest.mark.parametrize(
    ("broken", "case"),
    [
        (ConfusesStates, EvictionConformance.test_attention_and_states_of_one_node_differ),
        (ForgetsOnAccess, lambda kit: kit.test_any_history(0)),
        (RanksTwice, lambda kit: kit.test_any_history(0)),
        (NeverRemoves, EvictionConformance.test_a_removed_item_is_gone_and_may_come_back_larger),
        (RanksAtRandom, EvictionConformance.test_ranking_changes_nothing),
        (ConsumesWhatItRanks, EvictionConformance.test_ranking_changes_nothing),
        (NeverRemoves, EvictionConformance.test_a_full_store_goes_on),
    ],
)
def test_the_eviction_kit_notices(
    broken: Callable[[], EvictionPolicy], case: Callable[[EvictionConformance], None]
) -> None:
    case(TestFIFO())
    kit = TestFIFO()
    kit.make = broken  # type: ignore[method-assign]
    with pytest.raises((AssertionError, KeyError)):
        case(kit)


class TestLadder(CheckpointConformance):
    def make(self) -> CheckpointPolicy:
        return LadderCheckpoints()

    def test_the_end_the_branches_and_a_ladder(self) -> None:
        assert LadderCheckpoints(3, 256).suggest(10_000, 0, [64, 1024], 64) == (64, 1024, 1216, 2496, 4992, 10_000)
        assert LadderCheckpoints(3, 256).suggest(10_000, 2496, [64, 1024], 64) == (4992, 10_000)
        assert LadderCheckpoints(0).suggest(10_000, 10_000, [64], 64) == ()


class OnlyTheEnd(CheckpointPolicy):
    def suggest(
        self, prompt_tokens: int, resume_tokens: int, branch_points: Sequence[int], block_tokens: int
    ) -> tuple[int, ...]:
        return (prompt_tokens,) if prompt_tokens > resume_tokens else ()


class TestOnlyTheEnd(CheckpointConformance):
    def make(self) -> CheckpointPolicy:
        return OnlyTheEnd()


class Suggests(OnlyTheEnd):
    """Answers of which one is wrong."""

    def __init__(self, answer: Callable[[int, int, int], tuple[int, ...]]) -> None:
        self._answer = answer

    def suggest(
        self, prompt_tokens: int, resume_tokens: int, branch_points: Sequence[int], block_tokens: int
    ) -> tuple[int, ...]:
        return self._answer(prompt_tokens, resume_tokens, block_tokens)


@pytest.mark.parametrize(
    "answer",
    [
        lambda prompt, resume, block: (prompt, prompt),
        lambda prompt, resume, block: (prompt, prompt - block),
        lambda prompt, resume, block: (resume,),
        lambda prompt, resume, block: (prompt + 1,),
        lambda prompt, resume, block: (resume + 1,),
        lambda prompt, resume, block: tuple(range(resume + block, prompt, block)),
        lambda prompt, resume, block: (0,),
    ],
    ids=["repeats", "descends", "resumes", "past the end", "inside a block", "too many", "zero"],
)
def test_the_checkpoint_kit_notices(answer: Callable[[int, int, int], tuple[int, ...]]) -> None:
    kit = TestOnlyTheEnd()
    kit.test_lengths_that_a_writer_takes(5000, 16)
    kit.make = lambda: Suggests(answer)  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        kit.test_lengths_that_a_writer_takes(5000, 16)
