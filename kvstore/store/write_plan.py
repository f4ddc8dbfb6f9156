"""What a writer will store: where states go, which records, and what makes a request impossible.

Each check raises `WriteError`, which names the length, lease or grid and what would do instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import WriteError
from kvstore.pool import RecordNames
from kvstore.pool.plan import grid_digest
from kvstore.spec import ReuseRule
from kvstore.store.arguments import lengths_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.pool import NodePath, Prompt
    from kvstore.spec import ChunkGrid, ModelSpec, Shard
    from kvstore.store.lease import Lease


def written_path(target: Prompt, lengths: tuple[int, ...]) -> NodePath:
    """The nodes that a writer with these checkpoints writes to."""
    whole = len(target.path.keys)
    path = target.path if len(target) in lengths else target.path.prefix(whole)
    if not len(path):
        raise WriteError(
            f"a prompt of {len(target)} tokens fills no block of {target.path.block_tokens}; "
            "name its end in resume_at to store it as a tail"
        )
    return path


def check_continues(spec: ModelSpec, resume: Lease, shard: Shard, grid: ChunkGrid | None) -> None:
    """A writer continues from its own share, and on its own chunk boundaries."""
    if resume.shard != shard:
        raise WriteError(
            f"the lease is of worker {resume.shard.index} of {resume.shard.count}, the writer is {shard.index} of "
            f"{shard.count}; each worker resumes from its own share"
        )
    if grid is None:
        return
    if spec.state_groups and not grid.has(resume.tokens):
        raise WriteError(
            f"the lease ends at {resume.tokens} tokens, which is no chunk boundary of grid=; the next is "
            f"{grid.closing(resume.tokens)}"
        )
    for record in resume.records:
        expected = grid_digest(spec, resume.path, record.name.node, record.name.group, grid)
        if record.header.grid != expected:
            raise WriteError(
                f"the lease of {resume.tokens} tokens was computed on other chunk boundaries than grid= names; "
                "match with that grid, or write with grid=None"
            )


def check_grid(prompt: Prompt, grid: ChunkGrid) -> None:
    """The chunk that the prefill ended in must end with the prompt; a grid that ends before says nothing of it."""
    closing = grid.closing(len(prompt))
    if closing is not None and closing > len(prompt):
        raise WriteError(
            f"grid= says that the chunk with the prompt's last token ends at {closing}, past the "
            f"prompt's {len(prompt)}: its blocks would be taken for those of a longer chunk, and these are not "
            f"bitwise the same; end the grid with the prompt, as ChunkGrid.every(chunk, upto={len(prompt)}) does, "
            "or write the whole prompt that was computed"
        )


def checkpoints(
    spec: ModelSpec, prompt: Prompt, resume_at: Sequence[int] | None, start: int, grid: ChunkGrid | None
) -> tuple[int, ...]:
    """The lengths at which states will be stored, ascending; by default the prompt's end."""
    lengths = lengths_of(resume_at, len(prompt))
    block = spec.block_tokens
    for length in lengths:
        if not start < length <= len(prompt):
            raise WriteError(
                f"resume_at={length} is not past the {start} tokens that are resumed from, "
                f"and at most the prompt's {len(prompt)}"
            )
        if length % block and length != len(prompt):
            raise WriteError(
                f"resume_at={length} is neither a multiple of block_tokens={block} nor the prompt's end, {len(prompt)}"
            )
        if grid is not None and not grid.has(length) and spec.state_groups:
            raise WriteError(f"resume_at={length} is no chunk boundary of grid=; the next is {grid.closing(length)}")
    return lengths


def names_written(spec: ModelSpec, path: NodePath, lengths: tuple[int, ...], first: int, shard: Shard) -> RecordNames:
    """What a writer provides: attention from the block it resumes in, states at its checkpoints."""
    names: list[RecordNames] = []
    states = {node for length in lengths if (node := path.node_at(length)) is not None}
    for index, group in enumerate(spec.groups):
        units = group.units_written_by(shard)
        if units is None:
            continue
        nodes = range(first, len(path)) if group.rule is ReuseRule.ATTENTION else sorted(states)
        names.append(RecordNames.of_spans(nodes, index, len(spec.spans[index]), units))
    return RecordNames.join(names)
