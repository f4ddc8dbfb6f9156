"""The prefix index as the pool uses it: the native one, what waits at its nodes, and the policy that ranks victims.

Not thread-safe: the pool calls it under its lock. See docs/architecture.md, "Index".
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from kvstore._native import Needs
from kvstore._native import PrefixIndex as NativeIndex
from kvstore.abc import SlotRows
from kvstore.events import RemovedWhy
from kvstore.events.changes import in_order, unpacked
from kvstore.limits import GHOSTS_MAX, GONE_KEYS_MAX, SPARSE_NODES_BYTES_MAX
from kvstore.pool.sparse import SparseNodes
from kvstore.pool.victims import ITEM_BYTES, PolicyFeed
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore._native import HeldRows, WriteSet
    from kvstore.abc import EvictionPolicy
    from kvstore.events import Changes, Tell
    from kvstore.pool.path import HandOver, RecordPlace
    from kvstore.spec import ModelSpec, Shard

NODE_BYTES: int = NativeIndex.NODE_BYTES
"""Memory of one prefix node, its share of the hash table included."""
RECORD_BYTES: int = NativeIndex.RECORD_BYTES
"""Memory of one record in the index."""
GONE_KEY_BYTES = 200
"""Python memory of one remembered reason (estimated)."""
LASTING_US: int = NativeIndex.LASTING_US
"""The end of what has none."""

GHOST_FRACTION_MAX = 1 / 32
"""Share of a tier's capacity that ghosts may take, and as much again for hints of sparse nodes: they must not crowd out
the records that they are hints about."""


def ghosts_max_of(capacity_bytes: int) -> int:
    """How many ghosts the index of a tier of this capacity may keep."""
    return min(GHOSTS_MAX, int(capacity_bytes * GHOST_FRACTION_MAX) // NODE_BYTES)


@lru_cache(maxsize=1024)
def needs_of(spec: ModelSpec, shard: Shard, groups: tuple[int, ...] | None = None) -> Needs:
    """The records that a worker needs at each node, of all groups or of some."""
    return Needs(
        [
            (index, group.rule is ReuseRule.STATE, len(spec.spans[index]), sorted(group.units_read_by(shard)))
            for index, group in enumerate(spec.groups)
            if groups is None or index in groups
        ]
    )


class PrefixIndex:
    """The native index with the Python objects that hang on it.

    Attributes:
        native: the index itself.
        payload_bytes: bytes of waiting hand-over payloads.
        sparse: which sparse nodes are known.
        gone: nodes that damage or age took, by key and whether it took their states: why. Bounded; what is stored
            again is forgotten here.

    Args:
        policy: ranks victims; None lets the index evict what was used longest ago.
        has_quotas: victims will be chosen within single salts; without a policy each salt has its own order of use.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: EvictionPolicy | None = None,
        ghosts_max: int = GHOSTS_MAX,
        sparse_bytes_max: int = SPARSE_NODES_BYTES_MAX,
        *,
        has_quotas: bool = False,
    ) -> None:
        are_states = [group.rule is ReuseRule.STATE for group in spec.groups]
        self.native = NativeIndex(are_states, ghosts_max, policy is None, has_quotas)
        self._feed = PolicyFeed(self.native, policy) if policy is not None else None
        self._handovers: dict[int, list[tuple[HandOver, Mapping[RecordPlace, bytes]]]] = {}
        self.payload_bytes = 0
        self.sparse = SparseNodes(sparse_bytes_max)
        self.gone: dict[tuple[bytes, bool], RemovedWhy] = {}
        self._watchers: tuple[tuple[str, Tell], ...] = ()

    @property
    def hint_bytes(self) -> int:
        """Memory that nobody made room for before it was taken."""
        return self._hint_bytes + self.native.life_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory of the index, of what a policy was given, of waiting hand-over payloads and hints of sparse nodes."""
        policy_bytes = self._feed.memory_bytes if self._feed is not None else 0
        return self.native.memory_bytes + policy_bytes + self._hint_bytes

    @property
    def _hint_bytes(self) -> int:
        """Of Python's objects: waiting payloads, hints of sparse nodes, reasons that are remembered."""
        return self.payload_bytes + self.sparse.memory_bytes + len(self.gone) * GONE_KEY_BYTES

    @property
    def record_bytes(self) -> int:
        """Memory that one record takes at most."""
        return RECORD_BYTES if self._feed is None else RECORD_BYTES + ITEM_BYTES

    def is_stored(self, key: bytes) -> bool:
        """Whether a node has records."""
        node = self.native.find(key)
        return node is not None and self.native.holds_records(node)

    # What changes who may be evicted, and what waits

    def hold(self, held: HeldRows) -> None:
        self.native.hold(held)
        self._settle()

    def release(self, held: HeldRows) -> SlotRows:
        """End a hold; the slots that came free with a tail that was there for a hand-over only."""
        return self._removed(self.native.release(held), RemovedWhy.HANDED_OVER)

    def commit(
        self,
        writes: WriteSet,
        ready: npt.NDArray[np.uint64],
        costs_us: npt.NDArray[np.uint64],
        *,
        ends_at_us: int = LASTING_US,
        committed_nodes: int = 0,
    ) -> list[int]:
        """Records appear; the numbers of those that are given back.

        Args:
            ends_at_us: until when the writer wants what lies on its path.
            committed_nodes: how many nodes of it, from the root, it has committed.
        """
        given_back = self.native.commit(writes, ready, costs_us, ends_at_us=ends_at_us, committed_nodes=committed_nodes)
        self._settle()
        self.tell()
        return given_back

    def let_go(self, writes: WriteSet) -> SlotRows:
        return self._removed(self.native.let_go(writes), RemovedWhy.HANDED_OVER)

    def expire(self, now_us: int, *, even_written: bool = False) -> SlotRows:
        """Forget what has ended by now; see `take_expired` of the native index for what that was.

        Args:
            even_written: also what a running writer goes on from.
        """
        return self._removed(self.native.expire(now_us, even_written), RemovedWhy.EXPIRED)

    def evict(self, node: int, *, states_only: bool) -> SlotRows:
        return self._removed(self.native.evict(node, states_only), RemovedWhy.DROPPED)

    def condemn(self, node: int, *, is_state: bool, why: RemovedWhy = RemovedWhy.DAMAGED) -> SlotRows:
        return self._removed(self.native.condemn(node, is_state), why)

    def evict_chosen(self) -> SlotRows:
        return self._removed(self.native.evict_chosen(), RemovedWhy.EVICTED)

    def choose(self, target_bytes: int) -> int:
        """Choose victims until so many bytes would be freed; the bytes that those chosen so far would."""
        if self._feed is not None:
            return self._feed.choose(target_bytes)
        return self.native.choose(target_bytes)

    def choose_in(self, salt: bytes, target_bytes: int) -> int:
        """Choose victims of one salt, before any others, until its share would shrink by so many bytes.

        Returns by how many it would so far.
        """
        if self._feed is not None:
            return self._feed.choose_in(salt, target_bytes)
        return self.native.choose_in(salt, target_bytes)

    def look_ahead(self) -> None:
        """Have victims ready before they are needed."""
        if self._feed is not None:
            self._feed.refill()

    def _removed(self, table: npt.NDArray[np.uint64], why: RemovedWhy) -> SlotRows:
        for node in self.native.take_lost_handovers():
            for handover, _ in self._handovers.pop(node):
                self.payload_bytes -= len(handover.payload)
        self._settle()
        self.tell(why)
        return SlotRows(table)

    # What others are told

    def watch(self, tier: str, tell: Tell) -> list[tuple[str, Changes]]:
        """Tell of every change from here on, until `tell` wants no more; what is there at this moment.

        Args:
            tier: under which name.
        """
        if self._watchers:
            self.tell()
        else:
            self.native.watch(True)
        self._watchers = (*self._watchers, (tier, tell))
        return [(tier, changes) for changes in in_order(self.native.contents())]

    def tell(self, why: RemovedWhy = RemovedWhy.EVICTED) -> None:
        """Tell those who watch what has changed; for callers only after what they did to `native` directly."""
        if not self._watchers or not self.native.change_count:
            return
        self._tell_all(unpacked(self.native.take_changes(), why))

    def _tell_all(self, all_changes: Sequence[Changes]) -> None:
        for changes in all_changes:
            self._watchers = tuple((tier, tell) for tier, tell in self._watchers if tell(tier, changes))
        if not self._watchers:
            self.native.watch(False)

    def tell_closed(self) -> None:
        """Everything is about to go with the tier."""
        if self._watchers:
            self._tell_all([replace(each, why=RemovedWhy.CLOSED) for each in in_order(self.native.contents())])

    def remember_gone(self, key: bytes, why: RemovedWhy, *, is_state: bool) -> None:
        """Damage or age takes a node: who misses it is told so. The oldest such memory makes room."""
        self.gone.pop((key, is_state), None)
        self.gone[key, is_state] = why
        while len(self.gone) > GONE_KEYS_MAX:
            del self.gone[next(iter(self.gone))]

    def forget_gone(self, keys: Iterable[bytes]) -> None:
        """These were stored anew, and whatever goes from here on goes for other reasons."""
        for key in keys if self.gone else ():
            self.gone.pop((key, False), None)
            self.gone.pop((key, True), None)

    def _settle(self) -> None:
        if self._feed is not None:
            self._feed.settle()

    # Hand-overs

    def handovers(self, node: int) -> list[tuple[HandOver, Mapping[RecordPlace, bytes]]]:
        """What decode processes are to pick up at a node, oldest first, with the grids of the records of each."""
        return self._handovers.get(node, [])

    def add_handover(self, node: int, handover: HandOver, grids: Mapping[RecordPlace, bytes]) -> None:
        """Another hand-over waits at a node with records; all go with the first of them."""
        self._handovers.setdefault(node, []).append((handover, grids))
        self.native.set_handover(node, True)
        self.payload_bytes += len(handover.payload)

    def take_handover(self, node: int) -> tuple[HandOver, Mapping[RecordPlace, bytes]] | None:
        """The oldest hand-over that waits at a node, which it leaves."""
        waiting = self._handovers.get(node)
        if not waiting:
            return None
        taken = waiting.pop(0)
        self.payload_bytes -= len(taken[0].payload)
        if not waiting:
            del self._handovers[node]
            self.native.set_handover(node, False)
        return taken

    def check(self) -> None:
        """Assert every invariant; for tests (it walks the whole index)."""
        wrong = self.native.check()
        assert not wrong, wrong
        waiting = [handover for listed in self._handovers.values() for handover, _ in listed]
        assert self.payload_bytes == sum(len(handover.payload) for handover in waiting)
        assert all(self.native.holds_records(node) for node in self._handovers), "a hand-over outlived its records"
        if self._feed is not None:
            self._feed.check()
