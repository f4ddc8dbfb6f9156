"""What a store needs of a pool: the pool of this process, or one that another process owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from kvstore._native import addresses_of
from kvstore.errors import UnavailableError, WriteError
from kvstore.limits import JOINT_NAME_BYTES_MAX, JOINT_PARTIES_MAX
from kvstore.pool.arrays import RecordArrays
from kvstore.pool.observer import Observer
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from kvstore.abc import Slot
    from kvstore.clock import Deadline
    from kvstore.events import Changes, Tell
    from kvstore.pool.explanation import Explanation
    from kvstore.pool.flat import FlatHold, FlatWrite
    from kvstore.pool.held import HeldRecord, TransactionRecord
    from kvstore.pool.match import Match
    from kvstore.pool.path import HandOver, NodePath, RecordName, RecordPlace
    from kvstore.pool.pins import Pin
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.statistics import PoolStatistics
    from kvstore.spec import ChunkGrid, ModelSpec, Shard

EVICT_ROOT_MOST = 16384
"""First blocks that one call evicts: other callers of the pool come to their turn in between."""

CommitEnd: TypeAlias = "Callable[[BaseException | None], None]"
"""Told once how a commit ended: None for success. Called from any thread; must not block."""


@dataclass(frozen=True)
class JointName:
    """One party of a commit that several writers make together.

    Attributes:
        name: the same for all parties; one attempt.
        index, count: which party of how many.

    Raises:
        WriteError: the name is empty or too long, or there are too many parties.
    """

    name: str
    index: int
    count: int

    def __post_init__(self) -> None:
        size_bytes = len(self.name.encode(errors="replace"))
        if not 1 <= size_bytes <= JOINT_NAME_BYTES_MAX:
            raise WriteError(f"a joint commit's name has 1 to {JOINT_NAME_BYTES_MAX} bytes, not {size_bytes}")
        if not 0 <= self.index < self.count <= JOINT_PARTIES_MAX:
            raise WriteError(
                f"party {self.index} of {self.count} cannot be; a joint commit has 1 to {JOINT_PARTIES_MAX} parties"
            )


def _arrays_of(
    records: Sequence[HeldRecord] | Sequence[TransactionRecord],
) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
    arrays = RecordArrays.of((record.name, record.layout, record.header) for record in records)
    return arrays, addresses_of([record.memory for record in records])


class BaseHold(ABC):
    """Records that are neither evicted nor reused before `release`. Any thread.

    Attributes:
        path: the resume point's nodes.
        salt: whose prefix it is.
        handover: what waits there for a decode process.
    """

    path: NodePath
    salt: bytes
    handover: HandOver | None

    @property
    @abstractmethod
    def records(self) -> tuple[HeldRecord, ...]:
        """By group, span and node, the order in which a model needs them."""

    @property
    def arrays(self) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
        """As `records`, as arrays, and the address of each one's first byte."""
        return _arrays_of(self.records)

    @property
    @abstractmethod
    def pool(self) -> BasePool:
        """The pool that the records lie in."""

    @abstractmethod
    def check(self) -> None:
        """Raise unless the records are still held. Who copied asks again afterwards.

        Raises:
            StoreClosedError: the pool is closed. LeaseError: the hold was released. LeaseGoneError: it expired.
        """

    def wait_for(self, layer: int | None, deadline: Deadline) -> None:
        """Block until a layer's records, or all of them, are in memory and verified; at once unless taken layered.

        Raises:
            LoadFailedError: they could not be loaded. DeadlineError: they are still being loaded. Otherwise as `check`.
        """
        self.check()

    @abstractmethod
    def release(self) -> None:
        """Let the records go. Idempotent."""

    @abstractmethod
    def release_later(self) -> None:
        """As `release`, for finalizers: no lock is taken here, and the pool acts in its next call."""


class BaseTransaction(ABC):
    """Reserved records on one path, invisible until committed. Made by `BasePool.begin`; any thread.

    Attributes:
        path: the prefix nodes.
    """

    path: NodePath
    on_expiry: Callable[[str], None] | None = None
    """Called with the reason when this was open for too long and was aborted for that."""

    @property
    @abstractmethod
    def records(self) -> tuple[TransactionRecord, ...]:
        """What was missing and is now reserved."""

    @property
    def reserved_arrays(self) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
        """As `records`, as arrays, and the address of each one's first byte."""
        return _arrays_of(self.records)

    @property
    @abstractmethod
    def held(self) -> tuple[HeldRecord, ...]:
        """The requested records that were there already, and those of the resume point that is continued."""

    @property
    @abstractmethod
    def joint(self) -> JointName | None:
        """The joint commit that this is a party of."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether it has neither been committed as a whole nor aborted."""

    @abstractmethod
    def moving(self) -> AbstractContextManager[None]:
        """Bytes are about to land in, or leave from, the slots.

        If the transaction ends meanwhile, its slots are quarantined until this block is left.

        Raises:
            StoreClosedError, WriteError: the transaction has ended.
        """

    @abstractmethod
    def seal(self, index: int, cost_us: int = 0) -> None:
        """Every piece and checksum of a record is in place: write its framing. Idempotent.

        Raises:
            StoreClosedError, WriteError: the transaction has ended.
        """

    @abstractmethod
    def seal_all(self, indices: Sequence[int], costs_us: Sequence[int]) -> None:
        """As `seal`, for many records at once."""

    @abstractmethod
    def is_sealed(self, index: int) -> bool:
        """Whether a record is complete."""

    @abstractmethod
    def commit(self, upto_tokens: int | None = None, handover: HandOver | None = None) -> None:
        """Make everything up to a length visible at once, or nothing. Without a length, everything.

        Raises:
            WriteError: a record within the range is not sealed, the hand-over is too large, the transaction has ended,
            or it is a party of a joint commit. StoreClosedError: the store was closed. LeaseGoneError: what this write
            continues from was found damaged since; everything was given back.
        """

    @abstractmethod
    def commit_jointly(self, handover: HandOver | None, ended: CommitEnd) -> None:
        """Commit everything once all parties of the joint commit have come this far; `ended` is told how it went.

        Aborting the transaction meanwhile fails all parties, unless all were committed just before.

        Raises:
            WriteError: as `commit`, or it is no party of a joint commit. StoreClosedError: as `commit`.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Give back what was not committed. Idempotent, and without effect after a commit."""


class BasePool(ABC):
    """Records of one model spec. Any thread may call any method.

    Attributes:
        spec: the model.
    """

    spec: ModelSpec

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the pool was closed, or cannot be reached any more."""

    @property
    def may_load(self) -> bool:
        """Whether `hold` may have to wait for what lies elsewhere."""
        return True

    @abstractmethod
    def settle_later(self, end: Callable[[], None]) -> None:
        """Run `end` in a later call. For finalizers: they may run anywhere, also inside a lock."""

    @abstractmethod
    def match(
        self,
        prompt: Prompt,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        cap_tokens: int | None = None,
        accept_coverage: bool = False,
    ) -> Match:
        """The deepest resume point of a prompt, the other candidates, and why nothing deeper serves.

        A prompt that is not held whole finds what has its very coverage, and what is held whole.

        Args:
            accept_coverage: find what has any other coverage as well.
            cap_tokens: deepest length allowed; by default one token less than the prompt has.

        Raises:
            StoreClosedError: the pool is closed.
        """

    @abstractmethod
    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
        layered: bool = False,
        deadline: Deadline | None = None,
    ) -> BaseHold:
        """Keep every record of a resume point in place until the hold is released. What another tier has is loaded.

        Args:
            grid: the chunk boundaries that the records must have been computed with.
            grids: their digests by record, instead of `grid`, where only those are known (a hand-over).
            layered: return once there is space for what must be loaded; see `BaseHold.wait_for`.
            deadline: for loading.

        Raises:
            LeaseGoneError: a record is not there any more; nothing is held. LoadFailedError: it could not be loaded.
            PoolFullError: it must be loaded, and there is no room. DeadlineError: it is still being loaded, which goes
            on.
        """

    @abstractmethod
    def check_current(self, hold: BaseHold) -> None:
        """Raise unless the records of a hold are still what the index would give out.

        Damage takes records from under a hold: who holds the bytes may look at them, but nothing must be built on
        them and written back with new checksums.

        Raises:
            LeaseGoneError: a record was found damaged since.
        """

    @abstractmethod
    def accept_handover(self, path: NodePath) -> tuple[HandOver, Mapping[RecordPlace, bytes], BaseHold] | None:
        """Take the hand-over that waits at the end of a path and hold its records, in one step; None without one."""

    @abstractmethod
    def return_handover(self, path: NodePath, handover: HandOver, grids: Mapping[RecordPlace, bytes]) -> None:
        """Put back what was accepted and is not wanted; without effect if its records have gone."""

    @abstractmethod
    def take_handover(self, path: NodePath) -> HandOver | None:
        """The hand-over that waits at the end of a path, once, without holding anything."""

    @abstractmethod
    def missing(self, path: NodePath, names: Iterable[RecordName], grid: ChunkGrid | None = None) -> list[RecordName]:
        """Those of the named records that are not committed."""

    @abstractmethod
    def begin(
        self,
        path: NodePath,
        names: Sequence[RecordName],
        *,
        salt: bytes,
        grid: ChunkGrid | None = None,
        grid_digests: Mapping[RecordName, bytes] | None = None,
        resume_nodes: Iterable[int] = (),
        basis: Sequence[HeldRecord] = (),
        is_transient: bool = False,
        joint: JointName | None = None,
        ttl_s: float | None = None,
    ) -> BaseTransaction:
        """Reserve what is missing of the named records, evicting if need be, or change nothing.

        Args:
            names: the records that the writer will provide.
            salt: for accounting; the path's keys already cover it.
            grid: chunk boundaries that the writer computes with.
            grid_digests: their digests by record, instead of `grid`, where only those are known (a receiver).
            resume_nodes: nodes of the path that become resume points.
            basis: all records of a resume point that the caller holds and continues from.
            is_transient: the path's tail is for a hand-over only and goes with it.
            joint: the joint commit that this becomes a party of.
            ttl_s: how long what it commits lives after the commit; None for as long as there is room.

        Raises:
            PoolFullError: not enough can be evicted. QuotaError: not enough can be of this salt.
            QuarantineFullError: too many dropped writers still have bytes moving.
            WriteError: attention records would not be contiguous from the root.
            LeaseGoneError: a record of `basis` is not held any more. JointCommitError: another party has failed.
        """

    # Many short paths at once, in pools of a spec with one kind of record and blocks of one token

    @abstractmethod
    def stored(self, paths: Sequence[NodePath]) -> list[bool]:
        """Which paths are there whole, in whichever tier. The spec has one kind of record.

        Raises:
            StoreClosedError: the pool is closed.
        """

    def hold_flat(self, paths: Sequence[NodePath]) -> FlatHold | None:
        """Hold those paths that are in memory, for as long as they are copied out; None: this pool holds one by one.

        Raises:
            StoreClosedError: the pool is closed.
        """
        return None

    def begin_flat(self, paths: Sequence[NodePath], *, salt: bytes, ttl_s: float | None = None) -> FlatWrite | None:
        """As `begin`, for all records of many paths, or change nothing; None: this pool begins one by one.

        Raises:
            PoolFullError, QuotaError, QuarantineFullError: as `begin`, for all of it. StoreClosedError: closed.
        """
        return None

    @abstractmethod
    def pin(
        self, path: NodePath, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None, ttl_s: float | None = None
    ) -> Pin:
        """Keep a resume point from being evicted, without its memory being there to read.

        Raises:
            PinLimitError: pins keep too much. LeaseGoneError: a record is not there any more. UnavailableError: another
            process owns the pool.
        """

    @abstractmethod
    def expire(self, path: NodePath, ttl_s: float | None, *, after_tokens: int | None = None) -> int:
        """How long the deepest prefix of a path that is stored is to live from now on; its length, or 0.

        Args:
            after_tokens: its shorter resume points past this length end then, too.

        Raises:
            UnavailableError: another process owns the pool.
        """

    @abstractmethod
    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        """Drop a node's states, or its attention with everything below it; bytes freed.

        Returns 0 when the node is unknown or something of it is held.
        """

    @abstractmethod
    def evict_root(self, root: bytes, most: int = EVICT_ROOT_MOST) -> int:
        """`evict` what begins at a root: all that one salt, or adapter, has stored; how many prompts' begins were left.

        What is held stays, and is counted as left.

        Args:
            root: as `kvstore.keys.root_key`.
            most: first blocks that are evicted in this call; call again for the rest.
        """

    @abstractmethod
    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        """A record of this node is damaged: forget it and all that only it made reachable, held or not.

        Who holds the bytes keeps them; nobody else finds them again.

        Args:
            slot: where the damaged record lies; if it has left the index meanwhile, nothing happens.
        """

    def flush(self, deadline_s: float) -> None:
        """Wait until everything that was committed before is durable.

        Raises:
            UnavailableError: nothing here outlives a crash. DeadlineError: it is not durable yet. ShelfRefusedError:
            something was not kept; the message counts why. StoreClosedError: closed.
        """
        raise UnavailableError("nothing here outlives a crash; open the store with ssd=")

    @abstractmethod
    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change that may let others go on, outside any lock. It must not block."""

    @abstractmethod
    def unsubscribe(self, listener: Callable[[], None]) -> None:
        """End a subscription; without effect if there is none."""

    @abstractmethod
    def explain(self, prompt: Prompt, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None) -> Explanation:
        """What each tier has of a prompt, and what stands in the way of more. Counts as no match.

        Raises:
            StoreClosedError: the pool is closed.
        """

    @abstractmethod
    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        """Tell of all blocks that appear or leave, in any tier, until `tell` wants no more; what is there already.

        What is there and what is told of are without gap or overlap, in each tier.

        Args:
            tell: called under the lock that orders the changes, so it must neither wait nor call the pool.

        Raises:
            AttachError: the pool is another process's, which keeps its index. StoreClosedError: it is closed.
        """

    @cached_property
    def observer(self) -> Observer:
        """What is measured of its use in this process, and who is told. Whoever makes a store of it looks first."""
        return Observer()

    @abstractmethod
    def statistics(self) -> PoolStatistics:
        """Counters and the budget as they are now."""

    @abstractmethod
    def check(self) -> None:
        """Assert every invariant, the budget included; for tests (it walks the whole index)."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Leases and writers that are still open end with `StoreClosedError`. Idempotent."""

    @abstractmethod
    def close_in_child(self) -> None:
        """After a fork, in the child: threads do not survive it, and their locks stay as they were."""


def incomplete(record: TransactionRecord) -> WriteError:
    """What a commit says of a record that lacks pieces."""
    layers = record.layout.span.layers
    return WriteError(
        f"the record of group {record.layout.group.name!r}, layers {layers[0]} to {layers[-1]}, at "
        f"{record.header.end_tokens} tokens is not complete; put every layer and state before commit, or commit a "
        "shorter part"
    )
