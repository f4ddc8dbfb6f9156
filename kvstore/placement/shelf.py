"""Another tier beside the pool's memory, with an index of its own.

Each tier's set of records is contiguous from the root by itself. So a resume point that a tier knows is whole in that
tier, and the deepest one of a prompt is the deepest that any tier has: no tier has to know of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore._native import Finding
    from kvstore.abc import Slot
    from kvstore.clock import Deadline
    from kvstore.events import Changes, Tell
    from kvstore.handle import Handle
    from kvstore.placement.ends import Ends
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.pool.rows import Rows
    from kvstore.pool.search import Query
    from kvstore.spec import ChunkGrid, Shard


@dataclass(frozen=True)
class ShelfStatistics:
    """What a shelf holds and has done.

    Attributes:
        name: of the tier.
        capacity_bytes, used_bytes: of records and what comes with them; `used_bytes` counts dead space, too.
        committed_bytes: of records that a match can find.
        index_bytes: host memory of its index.
        kept_bytes: records that were given to it and written; `written_bytes` with all that came of it: the ratio is
            the write amplification.
        loaded_bytes: records that were read from it.
        evicted_records, damaged_records: that left it; `expired_records` of them because they had ended.
        refused: how often it did not take what it was given, by reason.
        trouble: why it does not work as it should, in a sentence; empty when it does.
    """

    name: str
    capacity_bytes: int
    used_bytes: int
    committed_bytes: int
    index_bytes: int
    kept_bytes: int
    written_bytes: int
    loaded_bytes: int
    evicted_records: int
    damaged_records: int
    expired_records: int
    refused: Mapping[str, int]
    trouble: str


class ShelfLoad(ABC):
    """Records on their way into host memory. Any thread."""

    @abstractmethod
    def wait(self, count: int, deadline: Deadline) -> Sequence[int]:
        """Block until the first `count` records, in the order asked for, have arrived or failed; those that failed.

        They are named by their positions in that order, ascending. What has arrived is not verified.

        Raises:
            DeadlineError: they have not arrived by then; the load goes on.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Load no more. Returns when nothing moves any longer: what has not arrived by then has failed. Idempotent."""


class ShelfHold(ABC):
    """The records of a resume point on a shelf; they stay where they are until released. Any thread.

    Attributes:
        path, salt: which one.
        rows: its records by group, span and node; slots are the shelf's own.
    """

    path: NodePath
    salt: bytes
    rows: Rows

    @abstractmethod
    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> ShelfLoad:
        """Begin to move records into host memory.

        Args:
            numbers: which of `rows`, in the order in which they are needed.
            addresses: where each goes: its whole slot, aligned to `RECORD_ALIGN_BYTES`. The memory must stay until the
                load has ended or was cancelled.
        """

    @abstractmethod
    def release(self) -> None:
        """Let the records go; loads that still run are cancelled first. Idempotent."""


class Shelf(ABC):
    """Records of one model spec in another tier. Any thread may call any method; none waits for bytes to move.

    A shelf gives no promise to keep anything, but for what a hold names.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The tier's name: `ssd`, `gpu`."""

    @property
    @abstractmethod
    def is_durable(self) -> bool:
        """Whether what it holds is there again after a crash."""

    @abstractmethod
    def find(self, query: Query) -> Finding:
        """Every resume point of a prompt that is here, deepest first, as `kvstore.pool.search.search` gives them."""

    @abstractmethod
    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> ShelfHold | None:
        """Keep the records of a resume point in place; None if one of them is not here."""

    @abstractmethod
    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends | None = None) -> Handle[int]:
        """Take what is lacking here of a resume point. What is here already lives as long, if that is longer.

        Resolves to the bytes of the records that were taken, once they can be found here (and are durable, on a shelf
        that is). Fails with `ShelfRefusedError` where the shelf does not want them or cannot take them.

        Args:
            placed: all records of the resume point, sealed. Their memory must stay as it is until the handle is done.
            ends: until when it is wanted, as it says when the records come into the index; None: it lasts.
        """

    # Time to live. The pool has the clock, and asks; what has ended is not found in a call that begins after `expire`.

    @property
    @abstractmethod
    def next_end_us(self) -> int:
        """When something may end next, by the pool's clock; `LASTING_US` while nothing does."""

    @abstractmethod
    def expire(self, now_us: int) -> int:
        """Forget what has ended by now, held or not; how many records. Their space returns when nobody uses it."""

    @abstractmethod
    def stored_tokens(self, path: NodePath) -> int:
        """The length of the deepest prefix of a path that has records here; 0 without one."""

    @abstractmethod
    def set_end(self, path: NodePath, ends_at_us: int, *, after_tokens: int, meant_tokens: int) -> None:
        """Until when a prompt that is stored is wanted, as `BasePool.expire` says it.

        Args:
            after_tokens: shorter resume points past this length end then, too.
            meant_tokens: the length of the deepest prefix that any tier has: that is the one which is meant.
        """

    def write_ends(self, deadline: Deadline) -> None:  # noqa: B027  # most have nothing to do
        """Wait until what is here has the same ends after a crash. For a durable shelf that writes them later.

        Raises:
            DeadlineError: it has not yet. ShelfRefusedError: they cannot be written.
        """

    @abstractmethod
    def ends_of(self, path: NodePath) -> npt.NDArray[np.uint64]:
        """As `Ends.table`, of what is here of a path."""

    @property
    @abstractmethod
    def lost_records(self) -> int:
        """How many records could be found here once and cannot any more: evicted, ended, damaged, dropped.

        It never falls, and has risen before anybody can miss them: while it stays as it is, what was here is here.
        """

    def drop_ended(self, key: bytes, *, is_state: bool) -> None:  # noqa: B027  # most have nothing to do
        """Something has ended in the pool: a node's states, or its attention with everything below it.

        For a tier that is not filled by `keep`, so that nobody tells it until when its records are wanted.
        """

    @abstractmethod
    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        """A record of this node is damaged: forget it and all that only it made reachable, held or not.

        Args:
            slot: where the damaged record lies; if it has left the index meanwhile, nothing happens.
        """

    @abstractmethod
    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        """Drop a node's states, or its attention with everything below it, for good; bytes freed.

        Returns 0 when the node is unknown or something of it is held.
        """

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        """As `kvstore.pool.BasePool.watch`, of this tier. One that does not tell is not seen in events."""
        return ()

    @abstractmethod
    def statistics(self) -> ShelfStatistics:
        """Counters and bytes as they are now."""

    @abstractmethod
    def check(self) -> None:
        """Assert every invariant; for tests."""

    @abstractmethod
    def close(self) -> None:
        """End what moves and let go of everything. Idempotent. What is durable stays.

        Loads that run fail, and so do handles of what was to be kept. From here on nothing is found, held or kept.

        Raises:
            DeadlineError: something that was begun does not end. It is closed all the same, and keeps what that uses.
        """

    @abstractmethod
    def close_in_child(self) -> None:
        """After a fork, in the child: threads do not survive it, and nothing of the parent's may be touched."""
