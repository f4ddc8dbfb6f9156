"""How a prefill is cut into chunks, and what of it is worth storing. Pure arithmetic, no model."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import WriteError
from kvstore.spec import ChunkGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.spec import ModelSpec


@dataclass(frozen=True)
class PrefillPlan:
    """The chunks of one prefill and the lengths at which it stores states.

    Attributes:
        chunks: token ranges, from the resume point to the prompt's end.
        grid: chunk boundaries from token 0; None when the resume point was computed with boundaries that
            are not known, so that what follows has no known grid either.
        checkpoints: ends of chunks at which states are stored, ascending.
    """

    chunks: tuple[tuple[int, int], ...]
    grid: ChunkGrid | None
    checkpoints: tuple[int, ...]

    @property
    def stored_tokens(self) -> int:
        """Length of the prefix that is stored: what lies past the last resume point is of no use; 0 for none."""
        return self.checkpoints[-1] if self.checkpoints else 0


def plan_prefill(
    spec: ModelSpec,
    *,
    prompt_tokens: int,
    resume_tokens: int,
    chunk_tokens: int,
    strict_grid: bool,
    is_grid_known: bool,
    wanted: Sequence[int],
    are_exact: bool = False,
    is_handover: bool = False,
) -> PrefillPlan:
    """Cut a prompt into chunks that end at multiples of `chunk_tokens` and at the prompt's end.

    Args:
        spec: the model.
        prompt_tokens: length of the prompt.
        resume_tokens: length of the part that is restored.
        chunk_tokens: tokens of a chunk.
        strict_grid: readers insist on their own grid. The prompt's end is then no resume point for a
            longer prompt, unless it happens to lie on the grid.
        is_grid_known: the restored part was computed on this grid.
        wanted: lengths at which states are wanted; those that are restored are there already.
        are_exact: take those lengths or fail, instead of the next possible length below.
        is_handover: the prompt's end is wanted, on the grid or not.

    Raises:
        WriteError: a wanted length cannot be a checkpoint of this prefill, and `are_exact`.
    """
    ends = [*range((resume_tokens // chunk_tokens + 1) * chunk_tokens, prompt_tokens, chunk_tokens), prompt_tokens]
    grid = ChunkGrid.every(chunk_tokens, upto=prompt_tokens) if is_grid_known else None
    allowed = [end for end in ends if end == prompt_tokens or end % spec.block_tokens == 0]
    if strict_grid and not is_handover and not are_exact and prompt_tokens % chunk_tokens:
        allowed.remove(prompt_tokens)
    wanted = [length for length in wanted if length > resume_tokens]
    if are_exact:
        surplus = sorted(set(wanted) - set(allowed))
        if surplus:
            raise WriteError(
                f"no states can be stored at {surplus[0]} tokens: a checkpoint ends a chunk that is still to be "
                f"computed, and a block unless it ends the prompt. Possible here: {_few(allowed)}"
            )
        chosen = set(wanted)
    elif spec.state_groups:
        below = (bisect_right(allowed, length) for length in wanted)
        chosen = {allowed[count - 1] for count in below if count}
    else:
        # Every block boundary of a model without states is a resume point, up to the last one stored.
        chosen = set(allowed[-1:])
    if is_handover:
        chosen.add(prompt_tokens)
    starts = [resume_tokens, *ends[:-1]]
    return PrefillPlan(tuple(zip(starts, ends, strict=True)), grid, tuple(sorted(chosen)))


def _few(lengths: Sequence[int]) -> str:
    shown = ", ".join(str(length) for length in lengths[:8])
    return f"{shown} ..." if len(lengths) > 8 else shown or "none"
