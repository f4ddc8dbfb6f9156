"""Shelves against their kit, and the kit against shelves with defects: each must fail the case named."""

from __future__ import annotations

import inspect
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.handle import Handle
from kvstore.spec import Shard
from kvstore.store import open_store
from kvstore.testing.memory_shelf import MemoryHold, MemoryLoad, MemoryShelf, ShelfMedium, copy_to
from kvstore.testing.shelf import TEST_S, ShelfConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from kvstore._native import Finding
    from kvstore.abc import Slot
    from kvstore.events import Changes, Tell
    from kvstore.placement.shelf import Shelf, ShelfStatistics
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath
    from kvstore.pool.search import Query
    from kvstore.store import Store


class TestMemoryShelf(ShelfConformance):
    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        with closing(MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes)) as shelf:
            yield shelf


class TestDurableMemoryShelf(ShelfConformance):
    @pytest.fixture
    def medium(self) -> ShelfMedium:
        return ShelfMedium()

    @pytest.fixture
    def shelf(self, medium: ShelfMedium) -> Iterator[Shelf]:
        self.medium = medium
        with closing(MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes, medium=medium)) as shelf:
            yield shelf

    def reopen(self, shelf: Shelf) -> Shelf:
        shelf.close()
        return MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes, medium=self.medium)


class KeepsTwice(MemoryShelf):
    """It says that it took all of it again."""

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows) -> Handle[int]:
        size_bytes = super().keep(path, salt, placed).result(TEST_S)
        handle: Handle[int] = Handle("keeping")
        handle.resolve(size_bytes or placed.slots.size_bytes)
        return handle


class IsDoneTooEarly(MemoryShelf):
    """The handle is done, and nothing can be found."""

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows) -> Handle[int]:
        handle: Handle[int] = Handle("keeping")
        handle.resolve(placed.slots.size_bytes)
        return handle


class ForgetsSalts(MemoryShelf):
    """What one tenant has is everybody's."""

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows) -> Handle[int]:
        return super().keep(path, b"", placed)


class AnyGrid(MemoryShelf):
    def find(self, query: Query) -> Finding:
        return super().find(replace(query, grid=None))

    def hold(self, path: NodePath, *, shard: Shard, grid: object = None, grids: object = None) -> MemoryHold | None:
        return super().hold(path, shard=shard)


class OneChunking(MemoryShelf):
    """What was computed with other chunk boundaries is taken for the same."""

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows) -> Handle[int]:
        held = self.hold(path, shard=Shard(0, 1))
        if held is None:
            return super().keep(path, salt, placed)
        held.release()
        handle: Handle[int] = Handle("keeping")
        handle.resolve(0)
        return handle


class AnyShare(MemoryShelf):
    """Half of the units serve who needs all of them."""

    def find(self, query: Query) -> Finding:
        return super().find(replace(query, shard=Shard(0, 2)))


class LoadsTheNeighbour(MemoryHold):
    """Two records change places."""

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> MemoryLoad:
        return super().load(numbers, np.roll(addresses, 1))


class LoadsByRow(MemoryHold):
    """The order in which records are asked for does not count."""

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> MemoryLoad:
        return super().load(np.sort(numbers), addresses)


class LoadsDamage(MemoryHold):
    """The last byte of each record is not what was kept."""

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> MemoryLoad:
        load = super().load(numbers, addresses)
        load.wait(len(numbers), Deadline.after(TEST_S))
        for number, address in zip(numbers.tolist(), addresses.tolist(), strict=True):
            size_bytes = self.rows.layouts()[number].record_bytes
            copy_to(address, np.zeros(size_bytes, np.uint8))
        return load


class GoesOnLoading(MemoryLoad):
    """`cancel` does not wait for what moves: it comes when the caller has the memory back."""

    def cancel(self) -> None:
        if not self._is_cancelled:
            self._is_cancelled = True
            self._shelf.loads.close()
            for position in range(len(self._sources)):
                copy_to(int(self._addresses[position]), np.zeros(64, np.uint8))
            self._shelf.loads.open()


class Cancelled(MemoryHold):
    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> MemoryLoad:
        sources = [self._views[number] for number in numbers.tolist()]
        load = GoesOnLoading(self._shelf, sources, self.rows.slots().taken(numbers.tolist()), numbers, addresses)
        self._loads.append(load)
        return load


class HoldsWith(MemoryShelf):
    """Holds are of another kind."""

    kind: ClassVar[type[MemoryHold]]

    def hold(self, path: NodePath, *, shard: Shard, grid: Any = None, grids: Any = None) -> MemoryHold | None:
        held = super().hold(path, shard=shard, grid=grid, grids=grids)
        if held is not None:
            held.__class__ = self.kind
        return held


def holding(made: type[MemoryHold]) -> type[MemoryShelf]:
    return type(f"Holds{made.__name__}", (HoldsWith,), {"kind": made})


class EvictsWhatIsHeld(MemoryShelf):
    """It says that it has freed what somebody reads."""

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        return super().evict(key, states_only=states_only) or 1


class KeepsTheDamaged(MemoryShelf):
    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        pass


class CondemnsWhatIsThere(MemoryShelf):
    """Whichever record lies there now goes for the damaged one."""

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        super().condemn(key, is_state=is_state)


class StatesTakeAttention(MemoryShelf):
    """A damaged state takes the prefix with it."""

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        super().condemn(key, is_state=False, slot=slot)


class EvictsStatesAlone(MemoryShelf):
    """Attention that was evicted is found again."""

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        return super().evict(key, states_only=True)


class LosesInSilence(MemoryShelf):
    """Who asks whether it has lost something is told that it has not."""

    @property
    def lost_records(self) -> int:
        return 0


class SaysNothingOfEvictions(MemoryShelf):
    """What leaves it is told to nobody."""

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        return super().watch(lambda tier, changes: tell(tier, changes) if changes.why is None else True)


class StaysOpen(MemoryShelf):
    is_over = False

    def close(self) -> None:
        if self.is_over:
            super().close()


class Overfull(MemoryShelf):
    """It holds more than its capacity."""

    def statistics(self) -> ShelfStatistics:
        found = super().statistics()
        return replace(found, used_bytes=found.used_bytes + 2 * found.capacity_bytes)


class RefusesInSilence(MemoryShelf):
    def statistics(self) -> ShelfStatistics:
        return replace(super().statistics(), refused={})


class ForgetsAtTheEnd(MemoryShelf):
    """It says that it is durable."""

    @property
    def is_durable(self) -> bool:
        return True


class Reopens(ShelfConformance):
    def reopen(self, shelf: Shelf) -> Shelf:
        shelf.close()
        return MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes)


K = ShelfConformance


@pytest.mark.parametrize(
    ("broken", "case"),
    [
        (KeepsTwice, K.test_only_what_is_lacking_is_taken),
        (IsDoneTooEarly, K.test_what_is_kept_is_found_and_loads),
        (IsDoneTooEarly, K.test_keeping_and_loading_beside_each_other),
        (ForgetsSalts, K.test_salts_are_apart),
        (AnyGrid, K.test_grids_are_asked_for),
        (OneChunking, K.test_chunkings_are_beside_each_other),
        (AnyShare, K.test_shards_are_asked_for),
        (IsDoneTooEarly, K.test_sparse_is_refused),
        (IsDoneTooEarly, K.test_what_is_larger_than_it_is_refused),
        (RefusesInSilence, K.test_what_is_larger_than_it_is_refused),
        (Overfull, K.test_makes_room),
        (holding(LoadsTheNeighbour), K.test_what_is_kept_is_found_and_loads),
        (holding(LoadsByRow), K.test_part_of_it_in_another_order),
        (holding(LoadsDamage), K.test_checkpoints_of_one_prompt),
        (holding(LoadsDamage), K.test_loads_beside_each_other),
        (holding(Cancelled), K.test_a_cancelled_load_moves_nothing_more),
        (EvictsWhatIsHeld, K.test_a_hold_keeps_what_it_names),
        (EvictsWhatIsHeld, K.test_begins_empty),
        (KeepsTheDamaged, K.test_condemned_attention_takes_what_hangs_on_it),
        (KeepsTheDamaged, K.test_a_hold_keeps_what_it_names),
        (StatesTakeAttention, K.test_condemned_states_leave_the_rest),
        (CondemnsWhatIsThere, K.test_condemned_too_late_is_nothing),
        (EvictsStatesAlone, K.test_evict),
        (LosesInSilence, K.test_evict),
        (LosesInSilence, K.test_condemned_states_leave_the_rest),
        (LosesInSilence, K.test_what_has_ended_is_not_found_held_or_not),
        (SaysNothingOfEvictions, K.test_what_it_tells_adds_up),
        (StaysOpen, K.test_close),
        (ForgetsAtTheEnd, K.test_what_is_durable_is_there_again),
    ],
    ids=lambda each: each.__name__,
)
def test_the_kit_notices(
    broken: type[MemoryShelf], case: Callable[[ShelfConformance, Shelf, Store], None] | Callable[..., None]
) -> None:
    kit = Reopens()
    takes_store = "source" in inspect.signature(case).parameters
    with (
        open_store(kit.spec, dram="4MiB") as source,
        closing(broken(kit.spec, capacity_bytes=kit.capacity_bytes)) as shelf,
    ):
        try:
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                case(kit, shelf, *([source] if takes_store else []))
        finally:
            shelf.is_over = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", [K.test_what_is_kept_is_found_and_loads, K.test_evict, K.test_close])
def test_the_kit_passes_what_is_sound(case: Callable[[ShelfConformance, Shelf, Store], None]) -> None:
    kit = Reopens()
    with (
        open_store(kit.spec, dram="4MiB") as source,
        closing(MemoryShelf(kit.spec, capacity_bytes=kit.capacity_bytes)) as shelf,
    ):
        case(kit, shelf, source)
