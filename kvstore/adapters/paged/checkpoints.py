"""At which lengths a request's states are kept: they are large, and exist at few of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
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
        block_tokens: of the store, which takes resume points at its blocks' ends, and at the end of what is written.
    """

    alignment_tokens: int
    has_states: bool
    has_windows: bool = False
    block_tokens: int = 1

    def lengths(self, start: int, stop: int, prompt_tokens: int, wanted: Iterable[int] = ()) -> tuple[int, ...]:
        """Lengths of the step that computes tokens `[start, stop)` at which to keep a resume point, ascending.

        These are the prompt's end; the last multiple of the alignment, which serves the same prompt when it comes
        again, since an engine computes its last token in any case; and what is wanted: branch points. Of them those at
        which everything there is to keep exists. What is written ends at the last of them.

        Args:
            start, stop: the step.
            prompt_tokens: length of the prompt, without what was generated.
            wanted: lengths that the store suggests.
        """
        step = self.alignment_tokens if self.has_states else lcm(self.alignment_tokens, self.block_tokens)
        chosen = {length for length in (prompt_tokens, stop // step * step, *wanted) if start < length <= stop}
        if self.has_states:
            return (stop,) if stop in chosen else ()
        last = max(chosen, default=0)
        if not self.has_windows:
            return (last,) if last else ()
        return tuple(length for length in sorted(chosen) if length == last or length % self.block_tokens == 0)
