"""Where a prompt's states are worth storing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.abc import CheckpointPolicy
from kvstore.limits import CHECKPOINTS_PER_WRITE_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence


class LadderCheckpoints(CheckpointPolicy):
    """The prompt's end, known branch points, and a ladder that halves towards the start.

    A state of a big hybrid model weighs as much as the attention of thousands of tokens, so a ladder of
    log2(n) rungs bounds the cost while a prompt that leaves this one's path anywhere finds a checkpoint at
    no less than half of what they share.

    Args:
        rungs_max: rungs of the ladder, at most.
        rung_tokens_min: no rung below this length.
    """

    def __init__(self, rungs_max: int = 6, rung_tokens_min: int = 256) -> None:
        self._rungs_max = rungs_max
        self._rung_tokens_min = rung_tokens_min

    def suggest(
        self, prompt_tokens: int, resume_tokens: int, branch_points: Sequence[int], block_tokens: int
    ) -> tuple[int, ...]:
        lengths = {prompt_tokens}
        lengths.update(branch_points)
        rung = prompt_tokens // 2
        for _ in range(self._rungs_max):
            if rung < self._rung_tokens_min or rung <= resume_tokens:
                break
            lengths.add(rung // block_tokens * block_tokens)
            rung //= 2
        wanted = sorted([length for length in lengths if resume_tokens < length <= prompt_tokens])
        return tuple(wanted[-CHECKPOINTS_PER_WRITE_MAX:])
