"""The store: a pool of this process, or one that another process owns, and what engines do with it."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvstore.attached import AttachedPool, Owner
from kvstore.errors import AttachError, LeaseGoneError, SpecError, StoreClosedError, TransferError, WriteError
from kvstore.limits import (
    ATTACH_DEADLINE_S,
    ATTACHED_SILENCE_S,
    CONNECT_DEADLINE_S,
    QUERY_DEADLINE_S,
    TRANSFER_PRIORITY_DEFAULT,
)
from kvstore.pool import BasePool, HandOver, JointName, Match, NodePath, Pool, PoolStatistics, Prompt, RecordNames
from kvstore.pool.plan import grid_digest
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.spec import WHOLE, ReuseRule
from kvstore.store.arguments import (
    check_coverage,
    check_deadline,
    check_joint,
    check_lease,
    check_match,
    check_position,
    check_spec,
    lengths_of,
    socket_path,
)
from kvstore.store.lease import Lease
from kvstore.store.waiters import Waiters
from kvstore.store.writer import Writer
from kvstore.tiers import ArenaTier
from kvstore.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from kvstore.abc import CheckpointPolicy, EvictionPolicy, TransportOptions
    from kvstore.handle import Handle
    from kvstore.keys import ExtraInput
    from kvstore.pool import BaseHold, BaseTransaction
    from kvstore.pool.path import RecordPlace
    from kvstore.spec import ChunkGrid, Coverage, ModelSpec, Shard
    from kvstore.transfer import (
        Endpoint,
        Fetcher,
        FetchReport,
        LinkSnapshot,
        RemoteMatch,
        Sender,
        TransferObserver,
        TransferReport,
        TransferSettings,
    )
    from kvstore.transfer.egress import Egress

DRAM_DEFAULT = "1GiB"


@dataclass(frozen=True)
class Arrival:
    """A prompt that was handed over to this process.

    Attributes:
        handover: the first sampled token and what came with it.
        match: the resume point, which ends at the prompt's very end.
        lease: on the very records that were handed over; they stay until it is released. Restore, then decode on.
    """

    handover: HandOver
    match: Match
    lease: Lease


def open_store(
    spec: ModelSpec,
    *,
    dram: int | str = DRAM_DEFAULT,
    eviction: EvictionPolicy | None = None,
    checkpoints: CheckpointPolicy | None = None,
    socket: str | os.PathLike[str] | None = None,
    arena: str | None = None,
    allow_uids: Iterable[int] = (),
    silence_s: float = ATTACHED_SILENCE_S,
    verify: bool = False,
) -> Store:
    """Open a store in this process; also `kvstore.open`.

    Args:
        spec: the model whose cache is kept.
        dram: bytes of host memory for records, headers and an estimate of the index: `"8GiB"`. All of it is
            allocated here.
        eviction: ranks what may go; least recently used by default.
        checkpoints: suggests where to take states; a halving ladder by default.
        socket: path of a Unix socket at which other processes of this host attach, with `kvstore.attach`.
        arena: name of the shared memory in `/dev/shm`; by default it has none, and goes with the last process.
        allow_uids: users that may attach besides this process's own and root. They can read and write the arena.
        silence_s: an attached process that is silent for longer loses its leases and writers.
        verify: recompute the checksum of every piece that an attached process wrote before it is committed.

    Raises:
        ArenaError: there is too little memory, or another owner has the arena's name. RecordTooLargeError: not even
        one record fits. AttachError: another owner serves the socket, or it cannot be made; or there is none, and an
        argument says how processes attach.
        ValueError: `dram` is not a size. SpecError: `spec` is none.
    """
    check_spec(spec)
    path = None if socket is None else socket_path(socket)
    allow_uids = tuple(allow_uids)
    is_owner_told = bool(allow_uids) or silence_s != ATTACHED_SILENCE_S or verify
    if path is None and is_owner_told:
        raise AttachError("allow_uids=, silence_s= and verify= are for attached processes; pass socket= as well")
    sizes = slot_sizes_bytes(spec)
    tier = ArenaTier(parse_bytes(dram), name=arena, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=sizes)
    try:
        pool = Pool(spec, tier, eviction=eviction, checkpoints=checkpoints)
        if path is None:
            return Store(pool)
        return Store(pool, Owner(pool, tier, path, allow_uids=allow_uids, silence_s=silence_s, verify=verify))
    except BaseException:
        tier.close()
        raise


def attach_store(
    socket: str | os.PathLike[str], *, spec: ModelSpec | None = None, deadline_s: float = ATTACH_DEADLINE_S
) -> Store:
    """A store on the pool of another process of this host; also `kvstore.attach`.

    It has the interface of the owner's own. Bytes move between this process and the arena directly; the owner only
    decides. While this process holds a lease or has a writer open, a thread tells the owner that it lives; stopped for
    longer than the owner bears (10 s by default), it loses them, with `LeaseGoneError` and `WriteError`.

    Args:
        socket: the path that the owner opened its store with.
        spec: the model that is expected; by default whatever the owner serves.
        deadline_s: an owner that does not answer for so long is taken for gone.

    Raises:
        AttachError: no owner listens there, or it refuses this process. OwnerGoneError: it does not answer.
        SpecError: it serves another spec; the message names both fingerprints.
    """
    if spec is not None:
        check_spec(spec)
    check_deadline(deadline_s)
    return Store(AttachedPool(socket_path(socket), spec=spec, deadline_s=deadline_s))


class Store:
    """Finds, reads, writes and sends the cache of prefixes. Any thread may call; a context manager.

    After a fork the child's store is closed: use spawn, or open another store there.
    """

    def __init__(self, pool: BasePool, owner: Owner | None = None) -> None:
        self.pool = pool
        self._owner = owner
        self.spec: ModelSpec = pool.spec
        self._waiters = Waiters(pool)
        # Its own thread keeps an open endpoint alive; one that was closed need not be remembered.
        self._endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()
        self._sender: Sender | None = None
        self._egress: Egress | None = None
        self._fetcher: Fetcher | None = None
        self._lock = threading.Lock()
        self._copied_bytes = 0
        self._copied_s = 0.0
        _OPEN_STORES.add(self)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prompt(
        self,
        token_ids: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        coverage: Coverage | None = None,
    ) -> Prompt:
        """Compute a prompt's keys once, for use in several calls.

        Raises:
            TokenError: no ids, negative, huge or too many ids, or a salt or extra input past its limit.
            SpecError: a coverage of another length, or of layers without attention.
        """
        check_coverage(coverage)
        return Prompt.of(self.spec, token_ids, salt=salt, adapter=adapter, extras=extras, coverage=coverage)

    def _as_prompt(
        self,
        prompt: Any,
        salt: bytes,
        adapter: str,
        extras: Iterable[ExtraInput],
        coverage: Coverage | None = None,
    ) -> Prompt:
        if isinstance(prompt, Prompt):
            if salt or adapter or tuple(extras) or coverage is not None:
                raise WriteError(
                    "a Prompt has its salt, adapter, extras and coverage already; pass them to Store.prompt only"
                )
            if not prompt.is_of(self.spec):
                raise SpecError("this Prompt was made for another model spec; make it with this store's prompt()")
            return prompt
        return self.prompt(prompt, salt=salt, adapter=adapter, extras=extras, coverage=coverage)

    # Reading

    def match(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        coverage: Coverage | None = None,
        accept_coverage: bool = False,
    ) -> Match:
        """How much of a prompt is there: a resume point, or a falsy match that says why not.

        What a sparse prefill wrote is found only by who asks for it; see `Match.is_exact`.

        Args:
            prompt: token ids, or a `Prompt`. At most one token less than it has can match.
            salt, adapter, extras: what it is cached under.
            shard: the tensor-parallel position whose share is asked for.
            grid: insist on these chunk boundaries (strict numerics); None takes any.
            coverage: take what holds just these tokens, too.
            accept_coverage: take whatever tokens the layers hold; of equal lengths what holds all comes first.

        Raises:
            TokenError, SpecError: as `prompt`. SpecError: `shard` or `grid` is of another type. StoreClosedError:
            closed.
        """
        check_position(shard, grid)
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)
        found = self.pool.match(target, shard=shard, grid=grid, accept_coverage=accept_coverage)
        return found if self._copied_s == 0.0 else found.timed(self._copied_s / self._copied_bytes)

    def read(self, match: Match, *, verify: bool = False) -> Lease:
        """Pin the records of a match and read them.

        Args:
            verify: recompute every checksum first. Damaged records leave the index, and the next best
                candidate of the match is read instead: look at the lease's `tokens`.

        Raises:
            LeaseGoneError: it was evicted since (or, verifying, nothing undamaged is left); match again.
            LeaseError: the match is a miss, or is none.
        """
        check_match(match)
        for candidate in match.candidates if verify else match.candidates[:1]:
            try:
                hold = self.pool.hold(candidate.path, shard=match.shard, grid=match.grid, grids=match.grids)
            except LeaseGoneError:
                if verify:
                    continue
                raise
            lease = Lease(self.spec, hold, match.shard, self._copied)
            damaged = lease.verify() if verify else []
            if not damaged:
                return lease
            lease.release()
            for held in damaged:
                is_state = self.spec.groups[held.name.group].rule is ReuseRule.STATE
                self.pool.condemn(candidate.path.key(held.name.node), is_state=is_state, slot=held.slot)
        raise LeaseGoneError("every resume point of this match was damaged or evicted; match again")

    def _copied(self, size_bytes: int, seconds: float) -> None:
        with self._lock:
            self._copied_bytes += size_bytes
            self._copied_s += seconds

    # Writing

    def write(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        resume_at: Sequence[int] | None = None,
        resume: Lease | None = None,
        grid: ChunkGrid | None = None,
        shard: Shard = WHOLE,
        joint: str | None = None,
        coverage: Coverage | None = None,
    ) -> Writer:
        """Reserve space for what the store lacks of a prompt, and write it while it is computed.

        Args:
            prompt: token ids, or a `Prompt`.
            salt, adapter, extras: what it is cached under.
            resume_at: lengths at which states will be stored: block boundaries, or the prompt's end, which
                alone stores the tokens past the last whole block too. By default the prompt's end.
            resume: the lease that the engine continues from; nothing before its end need be put again.
            grid: the chunk boundaries that the engine computes with; needed for strict matches later.
            shard: the tensor-parallel position whose share is written.
            joint: name of a commit that the writers of all `shard.count` positions make together, in whichever process:
                their shares become visible in one step, or none does. A name stands for one attempt.
            coverage: which tokens of each attention layer will be put, where a sparse or pruned prefill leaves some
                out. What is written is then found by readers that accept coverage only. If the store has all of the
                prompt whole, nothing is written.

        Raises:
            PoolFullError: there is no room, and nothing more can be evicted; nothing was changed.
            WriteError: a length in `resume_at` is impossible, or `resume` is no lease of this store on this prompt.
            LeaseError: `resume` was released. LeaseGoneError: it was found damaged since it was leased.
            TokenError: as `prompt`. SpecError: a `Prompt` of another spec; `shard` or `grid` is of another type, or the
            spec cannot be split so. JointCommitError: another party of `joint`
            has failed already.
        """
        check_position(shard, grid)
        check_lease(resume)
        check_joint(joint)
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)
        if resume is not None:
            resume.check_current()
            if not resume.continues_in(self.pool, target):
                raise WriteError(
                    f"the lease of {resume.tokens} tokens is not of this store and the beginning of this prompt; "
                    "resume from a lease on a match of the same token ids, salt, adapter and extras"
                )
            self._check_continues(resume, target, shard, grid)
        start = resume.tokens if resume is not None else 0
        lengths = self._checkpoints(target, resume_at, start, grid)
        if grid is not None:
            self._check_grid(target, grid)
        name = JointName(joint, shard.index, shard.count) if joint is not None else None
        transaction = None
        if target.masks and name is None and (resume is None or resume.is_exact):
            transaction = self._begin_whole(target.exact, lengths, resume, grid, shard)
        if transaction is None:
            transaction = self._begin(target, lengths, resume, grid, shard, name)
        writer = Writer(self, target, transaction, lengths, shard, target.path.coverage(self.spec))
        try:
            if target.masks:
                writer.fill_uncovered()
            if resume is not None:
                writer.resume_from(resume)
        except BaseException:
            writer.abort("what is there at its begin could not be filled in")
            raise
        return writer

    def _begin(
        self,
        target: Prompt,
        lengths: tuple[int, ...],
        resume: Lease | None,
        grid: ChunkGrid | None,
        shard: Shard,
        joint: JointName | None,
    ) -> BaseTransaction:
        path = self._written_path(target, lengths)
        first = resume.tokens // self.spec.block_tokens if resume is not None else 0
        return self.pool.begin(
            path,
            self._names(path, lengths, first, shard),
            salt=target.salt,
            grid=grid,
            resume_nodes=[node for length in lengths if (node := path.node_at(length)) is not None],
            basis=resume.records if resume is not None else (),
            joint=joint,
        )

    def _begin_whole(
        self,
        exact: Prompt,
        lengths: tuple[int, ...],
        resume: Lease | None,
        grid: ChunkGrid | None,
        shard: Shard,
    ) -> BaseTransaction | None:
        """A transaction that writes nothing, if all of a prompt that is to be held in part is there whole."""
        path = self._written_path(exact, lengths)
        if self.pool.missing(path, self._names(path, lengths, 0, shard), grid):
            return None
        transaction = self._begin(exact, lengths, resume, grid, shard, None)
        if transaction.records:
            # Evicted in this moment. Nothing that holds part of the tokens may ever be written here.
            transaction.abort("a sparse prefill writes no whole records")
            return None
        return transaction

    def _written_path(self, target: Prompt, lengths: tuple[int, ...]) -> NodePath:
        whole = len(target.path.keys)
        path = target.path if len(target) in lengths else target.path.prefix(whole)
        if not len(path):
            raise WriteError(
                f"a prompt of {len(target)} tokens fills no block of {self.spec.block_tokens}; "
                "name its end in resume_at to store it as a tail"
            )
        return path

    def _check_continues(self, resume: Lease, prompt: Prompt, shard: Shard, grid: ChunkGrid | None) -> None:
        if resume.shard != shard:
            raise WriteError(
                f"the lease is of worker {resume.shard.index} of {resume.shard.count}, the writer is {shard.index} of "
                f"{shard.count}; each worker resumes from its own share"
            )
        if grid is None:
            return
        if self.spec.state_groups and not grid.has(resume.tokens):
            raise WriteError(
                f"the lease ends at {resume.tokens} tokens, which is no chunk boundary of grid=; the next is "
                f"{grid.closing(resume.tokens)}"
            )
        for record in resume.records:
            expected = grid_digest(self.spec, resume.path, record.name.node, record.name.group, grid)
            if record.header.grid != expected:
                raise WriteError(
                    f"the lease of {resume.tokens} tokens was computed on other chunk boundaries than grid= names; "
                    "match with that grid, or write with grid=None"
                )

    @staticmethod
    def _check_grid(prompt: Prompt, grid: ChunkGrid) -> None:
        """The chunk that the prefill ended in must end with the prompt; a grid that ends before says nothing of it."""
        closing = grid.closing(len(prompt))
        if closing is not None and closing > len(prompt):
            raise WriteError(
                f"grid= says that the chunk with the prompt's last token ends at {closing}, past the "
                f"prompt's {len(prompt)}: its blocks would be taken for those of a longer chunk, and these are not "
                f"bitwise the same; end the grid with the prompt, as ChunkGrid.every(chunk, upto={len(prompt)}) does, "
                "or write the whole prompt that was computed"
            )

    def _checkpoints(
        self, prompt: Prompt, resume_at: Sequence[int] | None, start: int, grid: ChunkGrid | None
    ) -> tuple[int, ...]:
        lengths = lengths_of(resume_at, len(prompt))
        block = self.spec.block_tokens
        for length in lengths:
            if not start < length <= len(prompt):
                raise WriteError(
                    f"resume_at={length} is not past the {start} tokens that are resumed from, "
                    f"and at most the prompt's {len(prompt)}"
                )
            if length % block and length != len(prompt):
                raise WriteError(
                    f"resume_at={length} is neither a multiple of block_tokens={block} nor the prompt's end, "
                    f"{len(prompt)}"
                )
            if grid is not None and not grid.has(length) and self.spec.state_groups:
                raise WriteError(
                    f"resume_at={length} is no chunk boundary of grid=; the next is {grid.closing(length)}"
                )
        return lengths

    def _names(self, path: NodePath, lengths: tuple[int, ...], first: int, shard: Shard) -> RecordNames:
        """What this writer provides: attention from the block it resumes in, states at its checkpoints."""
        names: list[RecordNames] = []
        states = {node for length in lengths if (node := path.node_at(length)) is not None}
        for index, group in enumerate(self.spec.groups):
            units = group.units_written_by(shard)
            if units is None:
                continue
            nodes = range(first, len(path)) if group.rule is ReuseRule.ATTENTION else sorted(states)
            names.append(RecordNames.of_spans(nodes, index, len(self.spec.spans[index]), units))
        return RecordNames.join(names)

    # Waiting

    def accept(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        coverage: Coverage | None = None,
        accept_coverage: bool = False,
    ) -> Handle[Arrival]:
        """Take over a prompt that another process prefills: resolves once its hand-over is committed here.

        Each hand-over is taken once. Block with `.result(deadline_s)`, poll, or `await`; a wait that timed out
        goes on and may still take the hand-over, so `cancel` what is not wanted any more. Release the
        arrival's lease after reading. `coverage` and `accept_coverage` are as in `match`.
        """
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)

        def attempt() -> Arrival | None:
            paths = [target.path]
            if accept_coverage:
                found = self.pool.match(target, cap_tokens=len(target), accept_coverage=True)
                paths.extend(each.path for each in found.candidates if each.tokens == len(target))
            for path in dict.fromkeys(paths):
                accepted = self.pool.accept_handover(path)
                if accepted is not None:
                    return arrive(path, *accepted)
            return None

        def arrive(path: NodePath, handover: HandOver, grids: Mapping[RecordPlace, bytes], hold: BaseHold) -> Arrival:
            lease = Lease(self.spec, hold, WHOLE, self._copied)
            match = self.pool.match(target, cap_tokens=len(target), accept_coverage=accept_coverage)
            chosen = tuple(each for each in match.candidates if each.tokens < len(target) or each.path == path)
            return Arrival(handover, replace(match, candidates=chosen, grids=grids), lease)

        def undo(arrival: Arrival) -> None:
            self.pool.return_handover(arrival.lease.path, arrival.handover, arrival.match.grids or {})
            arrival.lease.release()

        return self._waiters.add(f"the hand-over of a prompt of {len(target)} tokens", attempt, undo)

    def when_ready(
        self,
        prompt: Any,
        tokens: int,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        coverage: Coverage | None = None,
        accept_coverage: bool = False,
    ) -> Handle[Match]:
        """Resolves once a resume point of at least `tokens` tokens is there; see `Match.pending_tokens`."""
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)

        def attempt() -> Match | None:
            match = self.match(target, shard=shard, grid=grid, accept_coverage=accept_coverage)
            return match if match.tokens >= tokens else None

        return self._waiters.add(f"a resume point of {tokens} tokens", attempt)

    # Other nodes

    def listen(
        self,
        address: str,
        *,
        transport: TransportOptions | None = None,
        settings: TransferSettings | None = None,
        observer: TransferObserver | None = None,
        serves: bool = False,
    ) -> Endpoint:
        """Receive transfers from other nodes: `listen("tcp://0.0.0.0:7400")`. Closed with the store.

        Args:
            address: `tcp://host:port`; port 0 lets the system choose, and the endpoint's `address` says which.
            transport: pacing and congestion control of the connections.
            settings: deadlines and limits.
            observer: told of each layer's bytes as they arrive.
            serves: let every peer that may connect ask what this store holds, and fetch it: `query` and `fetch` there.
                A salt that a peer does not present exactly is a miss.

        Raises:
            AddressError: the address is malformed, in use, or names no transport. UnavailableError: the transport
            does not work here, or cannot do what `transport` asks. TransferError: an option of another type.
            StoreClosedError: closed.
        """
        from kvstore.transfer import Endpoint

        with self._lock:
            self.check_open()
            endpoint = Endpoint(
                self.pool,
                address,
                transport=transport,
                settings=settings,
                observer=observer,
                serves=serves,
                egress=self._shared_egress() if serves else None,
            )
            self._endpoints.add(endpoint)
            return endpoint

    def send(
        self,
        match: Match,
        address: str,
        *,
        handover: HandOver | None = None,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
        resume: tuple[int, int] | None = None,
    ) -> Handle[TransferReport]:
        """Send a resume point to another node; only what is missing there crosses.

        The handle resolves when the other node has committed it. `cancel()` aborts on both sides.

        Args:
            match: what to send: the whole resume point.
            address: where the receiver listens, `tcp://host:port`.
            handover: makes it a hand-over: a process there decodes on, after `accept`.
            transport: pacing and congestion control of the connections.
            total_deadline_s: when to give up, at most an hour; by default from the bytes and the least rate.
            priority: 0 (first) to 255, for receivers that queue.
            observer: told of each layer's bytes as they leave.
            resume: `PeerGoneError.transfer` of an earlier, otherwise equal call: what has arrived since does not cross
                again, while the other node keeps it (10 s by default; `TransferAbortedError` says that it has not).

        Raises:
            LeaseGoneError: it was evicted since it was matched. LeaseError: the match is a miss.
            AddressError, UnavailableError: no transport for this address. TransferError: an option that is out of its
            limits, or of another type; too many transfers. The handle fails as that of `kvstore.transfer.Sender.send`.
        """
        from kvstore.transfer import send_lease

        sender = self.own_sender()
        return send_lease(
            self.read(match),
            address,
            handover=handover,
            transport=transport,
            total_deadline_s=total_deadline_s,
            priority=priority,
            observer=observer,
            resume=resume,
            sender=sender,
        )

    def links(self) -> tuple[LinkSnapshot, ...]:
        """How the links to the peers that this store has sent to are doing: values for a scheduler. Any thread."""
        with self._lock:
            egress = self._egress
        return () if egress is None else egress.links.snapshot()

    def query(
        self,
        prompt: Any,
        address: str,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        deadline_s: float = QUERY_DEADLINE_S,
    ) -> RemoteMatch:
        """Ask another node how much of a prompt it has; a falsy answer is a miss. Blocks; see `ask`.

        The prompt itself goes there, and the node computes its keys. It must listen with `serves=True`. Asked is what
        is whole: a prompt's coverage does not count.

        Args:
            prompt, salt, adapter, extras, shard, grid: as `match`.
            address: where the node listens, `tcp://host:port`.
            transport: congestion control of the connection.
            deadline_s: for connecting and the answer.

        Raises:
            DeadlineError, PeerGoneError: no answer. PeerMismatchError: it holds another model. TransferError: it does
            not answer such questions (the message says which switch or release it lacks), or an option is of another
            type. AddressError, UnavailableError: no transport for this address. Otherwise as `match`.
        """
        handle = self.ask(
            prompt,
            address,
            salt=salt,
            adapter=adapter,
            extras=extras,
            shard=shard,
            grid=grid,
            transport=transport,
            deadline_s=deadline_s,
        )
        # The work holds the deadline itself, and says more about what it waited for.
        return handle.result(deadline_s + CONNECT_DEADLINE_S)

    def ask(
        self,
        prompt: Any,
        address: str,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        deadline_s: float = QUERY_DEADLINE_S,
    ) -> Handle[RemoteMatch]:
        """As `query`, without blocking: the handle resolves with the answer, or fails as `query` raises."""
        check_position(shard, grid)
        target = self._as_prompt(prompt, salt, adapter, extras)
        return self._own_fetcher().query(
            target.exact, address, shard=shard, grid=grid, transport=transport, deadline_s=deadline_s
        )

    def fetch(
        self,
        prompt: Any,
        address: str | None = None,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
    ) -> Handle[FetchReport]:
        """Get from another node what it has of a prompt and this store lacks; only that crosses.

        The handle resolves when it is committed here, so that `match` finds it; a miss there is no error, and nothing
        is asked if no more could be had than is here. Fetches of one prefix share one transfer. `cancel()` aborts.

        Args:
            prompt: token ids, a `Prompt`, or what `query` returned (then all else about it is said, and nothing deeper
                is fetched than that answer, or what its `at` left of it).
            address: where the node listens, `tcp://host:port`; it must listen with `serves=True`.
            salt, adapter, extras, shard, grid: as `match`.
            transport: congestion control of the connections.
            total_deadline_s: when to give up, at most an hour; by default from the bytes and the least rate.
            priority: 0 (first) to 255, at both nodes.
            observer: told of each layer's bytes as they arrive.

        Raises:
            TransferError: no address, an option that is out of its limits or of another type, too many fetches.
            AddressError, UnavailableError: no transport for this address. Otherwise as `match`. The handle fails as
            that of `kvstore.transfer.Fetcher.fetch`.
        """
        from kvstore.transfer import RemoteMatch

        tokens_max: int | None = None
        if isinstance(prompt, RemoteMatch):
            if salt or adapter or tuple(extras) or shard != WHOLE or grid is not None:
                raise TransferError("a RemoteMatch says what was asked already; pass these to Store.query only")
            tokens_max, shard, grid = prompt.tokens, prompt.shard, prompt.grid
            address = prompt.address if address is None else address
            prompt = prompt.prompt
        if address is None:
            raise TransferError("address= is needed: where the node listens that is to be asked, 'tcp://host:port'")
        check_position(shard, grid)
        return self._own_fetcher().fetch(
            self._as_prompt(prompt, salt, adapter, extras).exact,
            address,
            shard=shard,
            grid=grid,
            tokens_max=tokens_max,
            transport=transport,
            total_deadline_s=total_deadline_s,
            priority=priority,
            observer=observer,
        )

    def _own_fetcher(self) -> Fetcher:
        from kvstore.transfer import Fetcher

        with self._lock:
            self.check_open()
            if self._fetcher is None:
                self._fetcher = Fetcher(self.pool)
            return self._fetcher

    def own_sender(self) -> Sender:
        """For `Writer`: who sends for this store; begun when it is first asked for."""
        from kvstore.transfer import Sender

        with self._lock:
            self.check_open()
            if self._sender is None:
                self._sender = Sender(egress=self._shared_egress())
            return self._sender

    def _shared_egress(self) -> Egress:
        """What all that leaves this store shares. Call with the lock held."""
        from kvstore.transfer.egress import Egress

        if self._egress is None:
            self._egress = Egress()
        return self._egress

    @property
    def sender(self) -> Sender | None:
        """Who sends for this store; None as long as nothing was sent."""
        return self._sender

    # The store itself

    @property
    def attached_process_count(self) -> int:
        """Processes on this store's pool, those included that are gone and may still write."""
        return 0 if self._owner is None else len(self._owner.processes())

    def statistics(self) -> PoolStatistics:
        """Counters, and what the budget is used for."""
        return self.pool.statistics()

    def close(self) -> None:
        """Cancel transfers, close endpoints, end waits, release memory. Idempotent.

        Open leases and writers become unusable.
        """
        with self._lock:
            endpoints, self._endpoints = list(self._endpoints), weakref.WeakSet()
            sender, self._sender = self._sender, None
            fetcher, self._fetcher = self._fetcher, None
        with ExitStack() as last:
            last.callback(_OPEN_STORES.discard, self)
            last.callback(self.pool.close)
            if self._owner is not None:
                last.callback(self._owner.close)
            last.callback(self._waiters.close)
            for endpoint in endpoints:
                last.callback(endpoint.close)
            if sender is not None:
                last.callback(sender.close)
            if fetcher is not None:
                last.callback(fetcher.close)

    def _close_in_child(self) -> None:
        self._lock = threading.Lock()
        self._endpoints = weakref.WeakSet()
        self._sender = None
        self._egress = None
        self._fetcher = None
        self._waiters = Waiters(self.pool)
        if self._owner is not None:
            self._owner.close_in_child()
        self.pool.close_in_child()

    @property
    def is_closed(self) -> bool:
        return self.pool.is_closed

    def check_open(self) -> None:
        """Raise `StoreClosedError` if the store was closed, or belongs to the parent of a fork."""
        if self.is_closed:
            raise StoreClosedError("the store is closed; open it again")


_OPEN_STORES: weakref.WeakSet[Store] = weakref.WeakSet()


def _close_in_child() -> None:
    # Threads and locks do not survive a fork; a store that only looks alive would hang or lie.
    for store in list(_OPEN_STORES):
        store._close_in_child()


os.register_at_fork(after_in_child=_close_in_child)
