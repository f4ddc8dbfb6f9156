"""At which lengths a request's states are kept: they are large, and exist at few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class CheckpointPolicy:
    """Which lengths of a step become resume points.

    Attributes:
        alignment_tokens: the engine's own hits end at multiples of this, so resume points there serve it best.
        has_states: states exist at the end of a step only. Without them windows still lie in their pages somewhat
            before it.
        has_windows: some group has a window. With neither every block is a resume point by itself.
    """

    alignment_tokens: int
    has_states: bool
    has_windows: bool = False

    def lengths(self, start: int, stop: int, prompt_tokens: int, wanted: Iterable[int] = ()) -> tuple[int, ...]:
        """Lengths of the step that computes tokens `[start, stop)` at which to keep a resume point, ascending.

        These are the prompt's end; the last multiple of the alignment, once for each step; and what is wanted: branch
        points. Of them those at which everything there is to keep exists.

        Args:
            start, stop: the step.
            prompt_tokens: length of the prompt, without what was generated.
            wanted: lengths that the store suggests.
        """
        chosen = {length for length in (prompt_tokens, *wanted) if start < length <= stop}
        aligned = stop // self.alignment_tokens * self.alignment_tokens
        if aligned > start:
            chosen.add(aligned)
        if self.has_states:
            chosen &= {stop}
        return tuple(sorted(chosen))
