"""Copies between an engine's pages and records: by table of pages, for whole prompts, windows and states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from kvstore.adapters.paged.registered import RegisteredGroup, register_group
from kvstore.adapters.paged.spec import group_names
from kvstore.errors import LeaseError, SpecError, WriteError
from kvstore.limits import DEVICE_COPY_DEADLINE_S
from kvstore.spec import WHOLE, ReuseRule

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from kvstore.adapters.paged.groups import EngineGroup
    from kvstore.errors import KVStoreError
    from kvstore.spec import ModelSpec, Shard
    from kvstore.store.lease import Lease
    from kvstore.store.writer import Writer

Tables: TypeAlias = Sequence[Sequence[int]]
"""One request's pages: for each of the engine's tables its page ids from the prompt's begin on."""


@dataclass(frozen=True)
class _Chosen:
    """Pages that something is copied out of, or into.

    Attributes:
        ids: a list from the page of `first_token` on, or one page of a state.
        start: the first token of attention that is copied.
        first_token: with which the first page begins.
    """

    ids: list[int] | int
    start: int = 0
    first_token: int = 0


class PagedMapping:
    """One worker's cache groups and pages. Without tensors it plans; after `register` it copies, too.

    Plans may be made by any thread. Copies are for several threads as those of `kvstore.Pages` are.

    Args:
        spec: of the model, from `spec_of` for the same groups.
        groups: of this worker: all of its layers.
        shard: its tensor-parallel position.
        null_page: the page id that stands for "no page" in tables; None if there is none.

    Raises:
        SpecError: groups that are not those of the spec.
    """

    def __init__(
        self, spec: ModelSpec, groups: Sequence[EngineGroup], shard: Shard = WHOLE, *, null_page: int | None = None
    ) -> None:
        self.spec = spec
        self.groups = tuple(groups)
        self.shard = shard
        self.null_page = null_page
        self._names = group_names(self.groups)
        self._registered: tuple[RegisteredGroup, ...] = ()
        _check_groups(spec, self.groups, self._names)

    @property
    def table_count(self) -> int:
        """Tables that a request of the engine needs to have at least."""
        return 1 + max(group.index for group in self.groups)

    @property
    def has_states(self) -> bool:
        """Whether some group has a state that exists at the end of a step only."""
        return any(group.is_state for group in self.groups)

    @property
    def window_tokens(self) -> int:
        """The longest window; 0 without."""
        return max((group.window_tokens or 0 for group in self.groups), default=0)

    def register(self, tensors: Mapping[str, Any], *, gather: str | None = None) -> None:
        """Make the engine's tensors known: once, before the first copy.

        Args:
            tensors: by the engine's name of the layer; a tensor, or a list of them. Their pages may be smaller than
                those of the tables, if a whole number of them makes one.
            gather: as for `kvstore.Pages`.

        Raises:
            SpecError: a layer is missing, or lies otherwise than its group says.
        """
        pages = [
            register_group(self.spec, group, name, self.shard, tensors, gather)
            for group, name in zip(self.groups, self._names, strict=True)
        ]
        self._registered = tuple(pages)

    def save(
        self,
        writer: Writer,
        tables: Tables,
        start: int,
        stop: int,
        *,
        at: int | None = None,
        layers: Iterable[int] | None = None,
        names: Collection[str] | None = None,
        cost_s: float = 0.0,
        stream: Any = None,
        deadline_s: float = DEVICE_COPY_DEADLINE_S,
    ) -> None:
        """Put tokens `[start, stop)` of attention groups, and the states and windows after `at` tokens.

        What the store has already is not copied. The pages may be reused when this returns.

        Args:
            writer: of the prompt; `at` is one of its `resume_at`.
            tables: of the request.
            at: None puts no states.
            layers: model layer numbers; all by default.
            names: of these only what the engine calls so: a layer may have attention and a state, by two names.
            cost_s: seconds of prefill that all of it took, if known.
            stream: whose work fills the pages.

        Raises:
            WriteError: a page that is needed is null, or a table is too short; or as `Writer.put_pages`.
            SpecError: nothing is registered, or a page id does not exist. DeadlineError, DeviceError: not copied.
        """
        planned = [
            (each, listed, chosen)
            for each, listed in self._chosen(layers, names)
            if (chosen := self._saved(each, writer, tables, start, stop, at)) is not None
        ]
        share_s = cost_s / max(1, sum(len(listed) for _, listed, _ in planned))
        for each, listed, chosen in planned:
            pages, ids = each.pages, {each.name: chosen.ids}
            own_s = share_s * len(listed)
            if each.group.rule is ReuseRule.ATTENTION:
                writer.put_pages(
                    pages,
                    ids,
                    tokens=slice(chosen.start, stop),
                    layers=listed,
                    first_token=chosen.first_token,
                    cost_s=own_s,
                    stream=stream,
                    deadline_s=deadline_s,
                )
            elif at is not None:
                writer.put_state_pages(
                    pages,
                    ids,
                    at=at,
                    layers=listed,
                    first_token=chosen.first_token,
                    cost_s=own_s,
                    stream=stream,
                    deadline_s=deadline_s,
                )

    def load(
        self,
        lease: Lease,
        tables: Tables,
        start: int = 0,
        *,
        layers: Iterable[int] | None = None,
        names: Collection[str] | None = None,
        stream: Any = None,
        deadline_s: float = DEVICE_COPY_DEADLINE_S,
    ) -> None:
        """Fill pages from a lease: tokens `[start, lease.tokens)`, and the states and windows at its end.

        No page is touched but those that `pages_filled` names; of a page in which `start` lies an attention group's
        tokens before it are left as they are, and a window's are not.

        Args:
            tables: of the request.
            start: tokens that the engine has already.
            layers: model layer numbers; all by default.
            names: of these only what the engine calls so.
            stream: the copy begins behind what it was asked so far.

        Raises:
            LeaseError: a page that is needed is null, or a table is too short; or as `Lease.copy_to_pages`.
            SpecError: nothing is registered, or a page id does not exist. DeadlineError, DeviceError: some pages may
            have been written.
        """
        length = lease.tokens
        if not 0 <= start <= length:
            raise LeaseError(f"a load from token {start} on of a resume point of {length} tokens; start before its end")
        planned = [
            (each, listed, chosen)
            for each, listed in self._chosen(layers, names)
            if (chosen := self._loaded(each, tables, start, length)) is not None
        ]
        for each, listed, chosen in planned:
            lease.copy_to_pages(
                each.pages,
                {each.name: chosen.ids},
                tokens=slice(chosen.start, length) if each.group.rule is ReuseRule.ATTENTION else None,
                layers=listed,
                first_token=chosen.first_token,
                stream=stream,
                deadline_s=deadline_s,
            )

    def pages_filled(self, tables: Tables, start: int, length: int) -> tuple[tuple[int, ...], ...]:
        """The pages that a load of `[start, length)` and of the states at `length` fills, by table.

        Raises:
            LeaseError: a page that is needed is null, or a table is too short.
        """
        filled: list[dict[int, None]] = [{} for _ in range(max(self.table_count, len(tables)))]
        for group in self.groups:
            if group.is_state:
                ids = [self._state_page(group, tables, length, LeaseError)]
            else:
                first = max(start, group.first_needed(length))
                ids = self._token_pages(group, tables, first, length, first, LeaseError)
            filled[group.index].update(dict.fromkeys(ids))
        return tuple(tuple(pages) for pages in filled)

    def can_save_at(self, tables: Tables, at: int) -> bool:
        """Whether the windows and states after `at` tokens lie in the tables' pages still."""
        try:
            for group in self.groups:
                if group.is_state:
                    self._state_page(group, tables, at, WriteError)
                elif group.is_window:
                    first = group.first_needed(at)
                    self._token_pages(group, tables, first, at, first, WriteError)
        except WriteError:
            return False
        return True

    def _chosen(
        self, layers: Iterable[int] | None, names: Collection[str] | None
    ) -> list[tuple[RegisteredGroup, tuple[int, ...]]]:
        if not self._registered:
            raise SpecError("no tensors are registered; call register() with the engine's own before the first copy")
        if layers is None and names is None:
            return [(each, each.group.layers) for each in self._registered]
        wanted = None if layers is None else set(layers)
        found = [
            (
                each,
                tuple(
                    layer
                    for layer, name in zip(each.group.layers, each.group.names, strict=True)
                    if (wanted is None or layer in wanted) and (names is None or name in names)
                ),
            )
            for each in self._registered
        ]
        if wanted is not None:
            unknown = wanted.difference(*(group.layers for group in self.groups))
            if unknown:
                raise SpecError(f"layer {min(unknown)} is in no group of this worker")
        return [(each, listed) for each, listed in found if listed]

    def _saved(
        self, each: RegisteredGroup, writer: Writer, tables: Tables, start: int, stop: int, at: int | None
    ) -> _Chosen | None:
        """The pages that a group's tokens or state are put from; None if there is nothing to put."""
        group = each.group
        if group.rule is ReuseRule.ATTENTION:
            # What the store has already is not looked at.
            start = writer.first_reserved(each.number, start, stop) if start < stop else stop
            if start == stop:
                return None
            first, needed = start, start
        elif at is None:
            return None
        elif group.is_state:
            return _Chosen(self._state_page(group, tables, at, WriteError))
        else:
            first, stop, needed = self._window_start(group, at), at, group.first_needed(at)
        ids = self._token_pages(group, tables, first, stop, needed, WriteError, keeps=True)
        return _Chosen(each.expand(ids), start, first // group.page_tokens * group.page_tokens)

    def _loaded(self, each: RegisteredGroup, tables: Tables, start: int, length: int) -> _Chosen | None:
        """The pages that a group's tokens or state are copied into, -1 for the others; None if there are none."""
        group = each.group
        if group.is_state:
            return _Chosen(self._state_page(group, tables, length, LeaseError))
        needed = max(start, group.first_needed(length))
        if needed == length:
            return None
        first = self._window_start(group, length) if group.is_window else start
        ids = self._token_pages(group, tables, first, length, needed, LeaseError)
        return _Chosen(each.expand(ids), start, first // group.page_tokens * group.page_tokens)

    def _window_start(self, group: EngineGroup, length: int) -> int:
        """The first token that a record of a window after `length` tokens holds."""
        return max(0, length - (group.window_tokens or 0))

    def _table(self, group: EngineGroup, tables: Tables, error: type[KVStoreError]) -> Sequence[int]:
        if group.index >= len(tables):
            raise error(f"there are {len(tables)} tables, and engine group {group.index} needs its own")
        return tables[group.index]

    def _token_pages(
        self,
        group: EngineGroup,
        tables: Tables,
        start: int,
        stop: int,
        needed: int,
        error: type[KVStoreError],
        *,
        keeps: bool = False,
    ) -> list[int]:
        """The table's pages of tokens `[start, stop)`.

        Args:
            needed: pages before that of this token are -1.
            keeps: unless there are such; -1 are those that the engine gave up.
        """
        table = self._table(group, tables, error)
        columns = group.columns(start, stop)
        if len(table) < columns.stop:
            raise error(
                f"the table of engine group {group.index} has {len(table)} pages, and tokens {start} to {stop} lie in "
                f"pages {columns.start} to {columns.stop - 1} of {group.page_tokens} tokens"
            )
        ids = [-1 if page == self.null_page else int(page) for page in table[columns.start : columns.stop]]
        unneeded = min(len(ids), group.columns(needed, stop).start - columns.start if needed < stop else len(ids))
        if min(ids[unneeded:], default=0) < 0:
            column = columns.start + unneeded + next(at for at, page in enumerate(ids[unneeded:]) if page < 0)
            raise error(
                f"page {column} of engine group {group.index} is none, and tokens {needed} to {stop} lie in it; the "
                "engine gave it up"
            )
        return ids if keeps else [-1] * unneeded + ids[unneeded:]

    def _state_page(self, group: EngineGroup, tables: Tables, length: int, error: type[KVStoreError]) -> int:
        table = self._table(group, tables, error)
        column = group.state_column(length)
        page = int(table[column]) if column < len(table) else -1
        if page < 0 or page == self.null_page:
            raise error(
                f"the table of engine group {group.index} has no page {column}, which holds the state after {length} "
                "tokens"
            )
        return page


def _check_groups(spec: ModelSpec, groups: Sequence[EngineGroup], names: Sequence[str]) -> None:
    known = {group.name: group for group in spec.groups}
    for group, name in zip(groups, names, strict=True):
        found = known.get(name)
        if found is None or found.rule is not group.rule or found.window_tokens != group.window_tokens:
            raise SpecError(f"engine group {group.index} is {name!r} by its form, which the spec does not have so")
        if found.tensors != tuple(tensor.spec for tensor in group.tensors):
            raise SpecError(f"engine group {group.index} has other tensors than group {name!r} of the spec")
        if not set(group.layers) <= set(found.layers):
            raise SpecError(f"engine group {group.index} has layers that group {name!r} of the spec does not have")
