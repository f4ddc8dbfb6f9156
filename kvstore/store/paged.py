"""Writing from an engine's pages, and reading into them: gathered on the device, through staging, in parts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore._native import copy_rows
from kvstore.clock import Deadline
from kvstore.errors import LeaseError, WriteError
from kvstore.record.array_view import view_array
from kvstore.record.copy import join_plans, plan_bytes, token_plan
from kvstore.record.threads import copy_threads
from kvstore.spec import ReuseRule
from kvstore.tiers.gpu.packing import PagePlaces, check_pages, packings_of_tensors, tensor_views
from kvstore.tiers.gpu.page_copies import CopyPart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvstore.errors import KVStoreError
    from kvstore.store.lease import Lease
    from kvstore.store.writer import Writer
    from kvstore.tiers.gpu.packing import Packing
    from kvstore.tiers.gpu.pages import Pages

    PageIds = npt.NDArray[np.int64]
    _Views = Callable[[int], dict[str, Any]]


def put_pages(
    writer: Writer,
    pages: Pages,
    page_ids: Mapping[str, Any] | Any,
    start: int,
    stop: int,
    *,
    layers: Iterable[int] | None,
    first_token: int,
    cost_s: float,
    stream: Any,
    deadline_s: float,
) -> None:
    """For `Writer.put_pages`: tokens `[start, stop)`."""
    _check(writer.spec, writer.shard, pages, WriteError)
    if writer.coverage is not None:
        raise WriteError("pages do not say which tokens of a sparse prefill they lack; put its arrays with put()")
    groups = _attention_layers(pages, layers, WriteError)
    costs_s = cost_s / max(1, len({layer for listed in groups.values() for layer in listed}))
    after = pages.device.stream_of(stream).mark()
    parts: list[CopyPart] = []
    for group, listed in groups.items():
        ids = _ids(pages, group, page_ids, first_token, start, stop, WriteError)
        # What the store has already is not gathered.
        begin = max(start, writer.first_reserved(group, start, stop))
        for chosen, first, last in _cut(pages, group, listed, begin, stop):

            def use(views: _Views, chosen: Sequence[int] = chosen, first: int = first, last: int = last) -> None:
                share = costs_s * (last - first) / (stop - start)
                for layer in chosen:
                    writer.put(layer, tokens=slice(first, last), cost_s=share, **views(layer))

            places = _places(pages, group, ids, first_token, first, last)
            parts.append(_part(pages, group, tuple(chosen), places, pages.pack, use))
    pages.copier.out_of_pages(parts, [after], Deadline.after(deadline_s))


def put_state_pages(
    writer: Writer,
    pages: Pages,
    page_ids: Mapping[str, Any],
    *,
    at: int,
    layers: Iterable[int] | None,
    first_token: int,
    cost_s: float,
    stream: Any,
    deadline_s: float,
) -> None:
    """For `Writer.put_state_pages`."""
    _check(writer.spec, writer.shard, pages, WriteError)
    groups = _state_layers(pages, page_ids, layers, WriteError)
    costs_s = cost_s / max(1, len({layer for listed in groups.values() for layer in listed}))
    after = pages.device.stream_of(stream).mark()
    parts: list[CopyPart] = []
    for group, listed in groups.items():
        places = _state_places(pages, group, page_ids[pages.spec.groups[group].name], at, first_token, WriteError)
        for chosen in _cut_layers(pages, group, listed, len(places)):

            def use(views: _Views, chosen: Sequence[int] = chosen) -> None:
                for layer in chosen:
                    writer.put_state(layer, at=at, cost_s=costs_s, **views(layer))

            parts.append(_part(pages, group, tuple(chosen), places, pages.pack, use))
    pages.copier.out_of_pages(parts, [after], Deadline.after(deadline_s))


def copy_to_pages(
    lease: Lease,
    pages: Pages,
    page_ids: Mapping[str, Any] | Any,
    *,
    tokens: slice | None,
    layers: Iterable[int] | None,
    first_token: int,
    stream: Any,
    deadline_s: float,
) -> None:
    """For `Lease.copy_to_pages`."""
    lease.check()
    _check(lease.spec, lease.shard, pages, LeaseError)
    start, stop = _range(tokens, lease.tokens)
    listed_layers = None if layers is None else tuple(layers)
    given = page_ids if isinstance(page_ids, Mapping) else None
    engine = pages.device.stream_of(stream)
    work: list[tuple[int, CopyPart]] = []
    attention = _attention_layers(pages, listed_layers, LeaseError)
    for group, listed in attention.items():
        ids = _ids(pages, group, page_ids, first_token, start, stop, LeaseError)
        _check_once(ids[(start - first_token) // pages.layout.group(group).page_tokens :], "tokens")
        for chosen, first, last in _cut(pages, group, listed, start, stop):

            def fill(views: _Views, chosen: Sequence[int] = chosen, first: int = first, last: int = last) -> None:
                for layer in chosen:
                    _read_tokens(lease, layer, views(layer), first, last)

            places = _places(pages, group, ids, first_token, first, last)
            work.append((chosen[0], _part(pages, group, tuple(chosen), places, pages.unpack, fill)))
    for group, listed in _state_layers(pages, given or {}, listed_layers, LeaseError).items():
        name = pages.spec.groups[group].name
        places = _state_places(pages, group, (given or {})[name], lease.tokens, first_token, LeaseError)
        for chosen in _cut_layers(pages, group, listed, len(places)):

            def restore(views: _Views, chosen: Sequence[int] = chosen) -> None:
                for layer in chosen:
                    lease.layer(layer).copy_to(**views(layer))

            work.append((chosen[0], _part(pages, group, tuple(chosen), places, pages.unpack, restore)))
    work.sort(key=lambda each: each[0])  # in the order in which a model needs them
    done = pages.copier.into_pages([part for _, part in work], [engine.mark()], Deadline.after(deadline_s))
    engine.wait(done)


def _read_tokens(lease: Lease, layer: int, views: Mapping[str, Any], start: int, stop: int) -> None:
    """Copy some tokens of a layer's attention tensors out of the records: `[rows, tokens, *inner]` each."""
    lease.layer(layer)  # which is there from here on
    spec, block = lease.spec, lease.spec.block_tokens
    plans = []
    for name, array in views.items():
        group = spec.group_index(layer, name)
        index = next(i for i, tensor in enumerate(spec.groups[group].tensors) if tensor.name == name)
        view = view_array(array, spec.groups[group].tensors[index].dtype, name, LeaseError)
        for column in lease.columns(group, layer):
            begins = column.nodes * block
            firsts = np.clip(start - begins, 0, column.valid)
            counts = np.clip(stop - begins, 0, column.valid) - firsts
            some = np.flatnonzero(counts)
            addresses, at = column.addresses[some], (begins + firsts - start)[some]
            plans.append(
                token_plan(column.layout, layer, index, lease.shard, view, addresses, firsts[some], at, counts[some])
            )
    plan = join_plans(plans, 6)
    copy_rows(plan, threads=copy_threads(plan_bytes(plan)))
    lease.check()  # released by another thread meanwhile, the slots may have been reused


def _part(
    pages: Pages,
    group: int,
    layers: tuple[int, ...],
    places: PagePlaces,
    move: Callable[[int, Mapping[int, Packing], PagePlaces, Any], None],
    use: Callable[[_Views], None],
) -> CopyPart:
    cache_group, shard = pages.spec.groups[group], pages.shard
    packings, size_bytes = packings_of_tensors(cache_group, shard, layers, len(places))

    def on_host(host: npt.NDArray[np.uint8]) -> None:
        use(lambda layer: dict(tensor_views(host, packings, cache_group, shard, layer)))

    return CopyPart(size_bytes, partial(move, group, packings, places), on_host)


def _check(spec: Any, shard: Any, pages: Pages, error: type[KVStoreError]) -> None:
    if spec != pages.spec or shard != pages.shard:
        raise error(
            f"the pages are of worker {pages.shard.index} of {pages.shard.count} of model {pages.spec.model!r}, and "
            f"this is of worker {shard.index} of {shard.count} of {spec.model!r}; register its own"
        )


def _range(tokens: slice | None, end: int) -> tuple[int, int]:
    if tokens is None:
        return 0, end
    start, stop = tokens.start or 0, end if tokens.stop is None else tokens.stop
    if tokens.step not in (None, 1) or not 0 <= start < stop <= end:
        raise LeaseError(f"tokens={tokens} is no range within the {end} tokens of the lease")
    return start, stop


def _attention_layers(
    pages: Pages, layers: Iterable[int] | None, error: type[KVStoreError]
) -> dict[int, tuple[int, ...]]:
    """Layers of each attention group that are moved: those named, or all that are registered."""
    wanted = None if layers is None else set(layers)
    found = {
        group: tuple(layer for layer in each.layers if wanted is None or layer in wanted)
        for group, each in pages.layout.groups.items()
    }
    if wanted is not None and wanted - {layer for listed in found.values() for layer in listed}:
        unknown = min(wanted - {layer for listed in found.values() for layer in listed})
        raise error(f"layer {unknown} has no registered pages; register it, or leave it out")
    return {
        group: listed
        for group, listed in found.items()
        if listed and pages.spec.groups[group].rule is ReuseRule.ATTENTION
    }


def _state_layers(
    pages: Pages, page_ids: Mapping[str, Any], layers: Iterable[int] | None, error: type[KVStoreError]
) -> dict[int, tuple[int, ...]]:
    """Layers of the state groups that are named."""
    wanted = None if layers is None else set(layers)
    numbers = {group.name: number for number, group in enumerate(pages.spec.groups)}
    found = {}
    for name in page_ids:
        if name not in numbers:
            raise error(f"page_ids names {name!r}, which is no cache group; there are: {', '.join(numbers)}")
        if pages.spec.groups[numbers[name]].rule is ReuseRule.STATE:
            each = pages.layout.group(numbers[name])
            listed = tuple(layer for layer in each.layers if wanted is None or layer in wanted)
            if listed:
                found[numbers[name]] = listed
    return found


def _ids(
    pages: Pages,
    group: int,
    page_ids: Any,
    first_token: int,
    start: int,
    stop: int,
    error: type[KVStoreError],
    *,
    least: int = 0,
) -> PageIds:
    """Page ids of a group with tokens, those of `[start, stop)` among them: `least` is -1 where some may be none."""
    name = pages.spec.groups[group].name
    if isinstance(page_ids, Mapping):
        if name not in page_ids:
            raise error(f"page_ids lacks group {name!r}; name its pages, or leave its layers out")
        page_ids = page_ids[name]
    ids = pages.ids(group, page_ids, least=-1)
    page_tokens = pages.layout.group(group).page_tokens
    if first_token < 0 or start < first_token:
        raise error(f"group {name!r}: tokens from {start} on do not lie in pages that begin at token {first_token}")
    needed = -(-(stop - first_token) // page_tokens)
    if len(ids) < needed:
        raise error(
            f"group {name!r}: tokens {first_token} to {stop} lie in {needed} pages of {page_tokens} tokens, and "
            f"{len(ids)} are named"
        )
    ids = ids[:needed]
    check_pages(ids[(start - first_token) // page_tokens :], pages.layout.group(group), name, least=least)
    return ids


def _check_once(ids: PageIds, what: str) -> None:
    if len(np.unique(ids)) != len(ids):
        raise LeaseError(f"a page is named twice for {what}; what is copied there last would win")


def _places(pages: Pages, group: int, ids: PageIds, first_token: int, start: int, stop: int) -> PagePlaces:
    page_tokens = pages.layout.group(group).page_tokens
    return PagePlaces.of_tokens(ids, page_tokens, start - first_token, stop - first_token)


def _state_places(
    pages: Pages, group: int, page_ids: Any, at: int, first_token: int, error: type[KVStoreError]
) -> PagePlaces:
    """Where a state after `at` tokens lies: one page; of a window its tokens in their pages."""
    cache_group = pages.spec.groups[group]
    if not pages.layout.group(group).page_tokens:
        ids = pages.ids(group, [page_ids] if np.ndim(page_ids) == 0 else page_ids)
        if len(ids) != 1:
            raise error(f"group {cache_group.name!r}: a state lies in one page, {len(ids)} are named")
        return PagePlaces.of_states(ids)
    start = at - cache_group.valid_tokens(pages.spec.block_tokens, at)
    ids = _ids(pages, group, page_ids, first_token, start, at, error, least=-1)
    return _places(pages, group, ids, first_token, start, at)


def _token_bytes(pages: Pages, group: int) -> int:
    """Bytes of one token, or of one state, of a layer of a group: what one image of one layer takes."""
    return packings_of_tensors(pages.spec.groups[group], pages.shard, (0,), 1)[1]


def _cut_layers(pages: Pages, group: int, layers: Sequence[int], places: int) -> Iterator[Sequence[int]]:
    """Layers in parts that staging takes, or one by one."""
    count = max(1, pages.copier.staging_bytes // (_token_bytes(pages, group) * places))
    return (layers[at : at + count] for at in range(0, len(layers), count))


def _cut(
    pages: Pages, group: int, layers: Sequence[int], start: int, stop: int
) -> Iterator[tuple[Sequence[int], int, int]]:
    """Tokens of layers in parts that staging takes; a part begins at a block unless it is the first."""
    if start >= stop:
        return
    block = pages.spec.block_tokens
    blocks = max(1, pages.copier.staging_bytes // (_token_bytes(pages, group) * block))
    for chosen in _cut_layers(pages, group, layers, stop - start):
        at = start
        while at < stop:
            end = min(stop, (at // block + blocks) * block)
            yield chosen, at, end
            at = end
