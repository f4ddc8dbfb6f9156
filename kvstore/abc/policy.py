"""What to keep, and where to take checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Evictable:
    """What the pool evicts in one piece: the attention records of one prefix node, or its states.

    Attributes:
        key: prefix key of the node.
        is_state: the node's states, rather than its attention block.
        size_bytes: bytes that its eviction alone frees.
        depth_tokens: length of the prefix.
    """

    key: bytes
    is_state: bool
    size_bytes: int
    depth_tokens: int


class EvictionPolicy(ABC):
    """Ranks evictables. The pool calls it under its lock, so it needs none; it does no I/O.

    The pool guarantees: an item is inserted once, accessed only while present, and removed once. A policy that raises
    is not asked again: what was being stored or read goes on, and the next write that must evict is refused by name.

    A node's attention and its states are two items; one that was removed may come back with another size. The same
    history must give the same ranking.
    """

    @abstractmethod
    def insert(self, item: Evictable) -> None:
        """A newly committed item, absent until now."""

    @abstractmethod
    def access(self, item: Evictable) -> None:
        """The item was part of a hit."""

    @abstractmethod
    def remove(self, item: Evictable) -> None:
        """The item is gone, evicted or otherwise."""

    @abstractmethod
    def ranked(self) -> Iterator[Evictable]:
        """Every item once, the first to evict first; asking changes nothing, and may end early.

        The pool takes what it needs and may evict, or nothing.

        Items that the pool cannot evict now (leased ones) are passed over; evicting a node's attention
        takes the items below it along. The pool does not change the policy while it iterates.

        The pool asks ahead of need, for `kvstore.limits.VICTIMS_AHEAD` items at a time, and evicts from what it was
        told; an item that was accessed since is not evicted on the strength of an earlier ranking.
        """

    # In bulk: what one commit, hit or eviction changes. Overridden where one call is cheaper than many.

    def insert_all(self, items: Sequence[Evictable]) -> None:
        """`insert` each, in order."""
        for item in items:
            self.insert(item)

    def access_all(self, items: Sequence[Evictable]) -> None:
        """`access` each, in order: what lies below comes before what it hangs on."""
        for item in items:
            self.access(item)

    def remove_all(self, items: Sequence[Evictable]) -> None:
        """`remove` each, in order."""
        for item in items:
            self.remove(item)


class CheckpointPolicy(ABC):
    """Chooses the lengths at which a prompt's states are worth storing."""

    @abstractmethod
    def suggest(
        self, prompt_tokens: int, resume_tokens: int, branch_points: Sequence[int], block_tokens: int
    ) -> tuple[int, ...]:
        """Lengths in (`resume_tokens`, `prompt_tokens`], ascending, without repeats; equal questions, equal answers.

        Each is a multiple of `block_tokens` or `prompt_tokens` itself; at most `CHECKPOINTS_PER_WRITE_MAX` of them.

        Args:
            prompt_tokens: tokens of the prompt.
            resume_tokens: where computing will begin.
            branch_points: lengths at which earlier prompts are known to have left this one's path.
            block_tokens: the spec's block.
        """
