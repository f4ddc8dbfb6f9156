"""From an engine's page ids to records: which nodes of a prompt lie in which pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import SpecError, WriteError
from kvstore.placement.gpu.page_table import Location, block_location
from kvstore.pool.plan import name_table
from kvstore.pool.rows import RecordNames
from kvstore.spec import ReuseRule, UnitRange
from kvstore.tiers.gpu.packing import check_pages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvstore.pool.path import NodePath
    from kvstore.pool.prompt import Prompt
    from kvstore.spec import CacheGroup, ChunkGrid, Shard
    from kvstore.tiers.gpu.device import Mark
    from kvstore.tiers.gpu.pages import Pages

NO_PAGE = -1
"""In a list of pages: the engine has given this one up."""


@dataclass(frozen=True, eq=False)
class PagedPath:
    """Records of a path, and where they lie.

    Attributes:
        path: the nodes.
        table: as `name_table` gives it, `[n, 6]`; with `digests`.
        costs_us: microseconds of prefill that each record saves, `[n]`.
        locations: by node and group.
    """

    path: NodePath
    table: npt.NDArray[np.uint64]
    digests: bytes
    costs_us: npt.NDArray[np.uint64]
    locations: Mapping[tuple[int, int], Location]


def units_in_pages(group: CacheGroup, shard: Shard) -> UnitRange:
    """The shard units of a group of which a worker's pages hold all rows."""
    written = group.units_written_by(shard)
    if written is not None:
        return written
    # Neighbours hold the same rows, and each may say so of its own pages.
    units = sorted(group.units_read_by(shard))
    return UnitRange(units[0], units[-1] + 1)


def name_pages(
    pages: Pages,
    units: Sequence[UnitRange],
    prompt: Prompt,
    page_ids: Mapping[str, Any] | Any,
    upto: int,
    states: Mapping[int, Mapping[str, int]],
    resume_at: Iterable[int],
    grid: ChunkGrid | None,
    ready: Mark | None,
) -> PagedPath:
    """The records that lie in pages, by what `PageShelf.note` is told.

    Raises:
        WriteError, SpecError: as there.
    """
    spec = pages.spec
    if not prompt.is_of(spec):
        raise WriteError("the prompt is of another model than the pages; make it with the store of their spec")
    lengths = _lengths(pages, prompt, upto, {*states, *resume_at})
    whole = upto // spec.block_tokens
    # The tail counts if it can be resumed from: with states that lie at its end, or where there are none at all.
    path = prompt.prefix(upto if upto in lengths or not spec.state_groups else whole * spec.block_tokens)
    if not len(path):
        raise WriteError(f"{upto} tokens are less than one block, and no resume point; there is nothing to note")
    ids = _ids_by_group(pages, page_ids, path.tokens)
    names: list[RecordNames] = []
    locations: dict[tuple[int, int], Location] = {}
    for number, group in enumerate(spec.groups):
        if group.rule is ReuseRule.ATTENTION:
            nodes = list(range(len(path)))
        else:
            at = {path.node_at(length): length for length in sorted(lengths)}
            nodes = [node for node in at if node is not None]
        page_tokens = pages.layout.group(number).page_tokens
        for node in nodes:
            end = path.end_tokens(node)
            if page_tokens:
                start = end - group.valid_tokens(spec.block_tokens, end)
                location = block_location(ids[group.name], page_tokens, start, end, ready)
            else:
                location = _state(pages, number, states.get(end, {}), end, ready)
            if location.pages.min() < 0:
                raise WriteError(
                    f"group {group.name!r}: a page that holds tokens of {end - location.tokens} to {end} is said to be "
                    "given up; name its id, or leave this length out"
                )
            locations[node, number] = location
        names.append(RecordNames.of_spans(nodes, number, len(spec.spans[number]), units[number]))
    table, digests = name_table(spec, path, RecordNames.join(names), grid, None)
    return PagedPath(path, table, digests, np.zeros(len(table), np.uint64), locations)


def _lengths(pages: Pages, prompt: Prompt, upto: int, lengths: set[int]) -> set[int]:
    if not 0 < upto <= len(prompt):
        raise WriteError(f"upto_tokens={upto} is outside the prompt's 1 to {len(prompt)} tokens")
    block = pages.spec.block_tokens
    for length in sorted(lengths):
        if not 0 < length <= upto:
            raise WriteError(f"a resume point at {length} tokens is outside the {upto} that lie in the pages")
        if length % block and length != upto:
            raise WriteError(
                f"a resume point at {length} tokens lies neither at the end of a block of {block} tokens nor at "
                f"upto_tokens={upto}; note the prompt up to there by itself"
            )
    if lengths and not pages.spec.state_groups:
        raise WriteError("the model has no states, so every block's end is a resume point; leave lengths out")
    return lengths


def _ids_by_group(pages: Pages, page_ids: Mapping[str, Any] | Any, tokens: int) -> dict[str, npt.NDArray[np.int64]]:
    spec = pages.spec
    named = {spec.groups[number].name: each for number, each in pages.layout.groups.items() if each.page_tokens}
    given = page_ids if isinstance(page_ids, Mapping) else dict.fromkeys(named, page_ids)
    unknown = sorted(set(given) - set(named))
    if unknown:
        raise WriteError(f"page_ids names {unknown[0]!r}, which is no cache group with tokens")
    found = {}
    for name, group in named.items():
        if name not in given:
            raise WriteError(f"page_ids lacks group {name!r}; name the pages of every group with tokens")
        number = next(i for i, each in enumerate(spec.groups) if each.name == name)
        ids = pages.ids(number, given[name], least=NO_PAGE)
        needed = -(-tokens // group.page_tokens)
        if len(ids) < needed:
            raise WriteError(
                f"{len(ids)} pages of {group.page_tokens} tokens are named for group {name!r}; {tokens} tokens lie in "
                f"{needed}"
            )
        found[name] = ids
    return found


def _state(pages: Pages, group: int, named: Mapping[str, int], at: int, ready: Mark | None) -> Location:
    name = pages.spec.groups[group].name
    unknown = sorted(set(named) - {pages.spec.groups[number].name for number in pages.spec.state_groups})
    if unknown:
        raise WriteError(f"states at {at} tokens name {unknown[0]!r}, which is no group of states")
    if name not in named:
        raise WriteError(f"states at {at} tokens lack the page of group {name!r}; a resume point needs every group's")
    page = np.array([named[name]], np.int64)
    try:
        check_pages(page, pages.layout.group(group), name)
    except SpecError as error:
        raise SpecError(f"states at {at} tokens: {error}") from error
    return Location(page, 0, 0, ready)
