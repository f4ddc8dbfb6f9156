"""Commits that several writers make together: all become visible in one step, or none."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvstore.clock import Deadline
from kvstore.errors import JointCommitError, KVStoreError, PoolError, WriteError
from kvstore.limits import JOINT_COMMITS_MAX, JOINT_OUTCOME_GRACE_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.pool.path import HandOver
    from kvstore.pool.seam import CommitEnd, JointName
    from kvstore.pool.transaction import Transaction


class CommitTogether(Protocol):
    """`Pool.commit_together`."""

    def __call__(self, commits: Sequence[tuple[Transaction, int | None, HandOver | None]]) -> None: ...


@dataclass(eq=False)
class Party:
    """One writer of a joint commit; made by `JointCommits.join`."""

    name: JointName
    joint: _Joint
    transaction: Transaction | None = None
    handover: HandOver | None = None
    ended: CommitEnd | None = None

    @property
    def failure(self) -> JointCommitError | None:
        """Why the joint commit has failed, if it has."""
        return None if self.joint.failure is None else _failed(self.name, self.joint.failure)


@dataclass(eq=False)
class _Joint:
    parties: dict[int, Party] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    failure: str | None = None
    is_over: bool = False
    forget_at: Deadline | None = None


class JointCommits:
    """The joint commits of one pool. Any thread.

    A name stands for one attempt. After a failure it is remembered until every party has been told, or a grace time
    has passed; after a success it is free again.
    """

    def __init__(self, commit_together: CommitTogether) -> None:
        self._commit_together = commit_together
        self._lock = threading.Lock()
        self._joints: dict[str, _Joint] = {}

    def join(self, name: JointName) -> Party:
        """Become a party, before anything is reserved.

        Raises:
            JointCommitError: another party has failed already. WriteError: the party is there already, or another
            number of parties was named. PoolError: too many joint commits are under way.
        """
        with self._lock:
            self._forget_old()
            joint = self._joints.get(name.name)
            if joint is None:
                if len(self._joints) >= JOINT_COMMITS_MAX:
                    raise PoolError(f"{JOINT_COMMITS_MAX} joint commits are under way, which is the limit; end some")
                joint = self._joints[name.name] = _Joint()
            known = next(iter(joint.parties.values()), None)
            if known is not None and known.name.count != name.count:
                raise WriteError(
                    f"the joint commit {name.name!r} has {known.name.count} parties, not {name.count}; give every "
                    "writer of it the same shard count"
                )
            if joint.failure is not None:
                joint.told.add(name.index)
                self._forget_if_told(name.name, joint, name.count)
                raise _failed(name, joint.failure)
            if name.index in joint.parties:
                raise WriteError(
                    f"party {name.index} of the joint commit {name.name!r} is there already; "
                    "a name stands for one attempt"
                )
            party = Party(name, joint)
            joint.parties[name.index] = party
            return party

    def leave(self, party: Party) -> None:
        """Nothing could be reserved for this party: it has not come, and may come again."""
        with self._lock:
            party.joint.parties.pop(party.name.index, None)
            if not party.joint.parties and party.joint.failure is None:
                self._joints.pop(party.name.name, None)

    def begun(self, party: Party) -> None:
        """A party has reserved its share. If another failed meanwhile, nobody has told this one: it is given back.

        Raises:
            JointCommitError: another party has failed. WriteError: it writes something else than the others, which
            fails them all.
        """
        with self._lock:
            failure = party.joint.failure
            others = [other.transaction for other in party.joint.parties.values() if other is not party]
        mine = party.transaction
        if failure is None and mine and any(other is not None and other.path != mine.path for other in others):
            reason = (
                f"party {party.name.index} of the joint commit {party.name.name!r} writes another prompt, or less of "
                "it, than the others; every party writes its share of the same token ids, salt and adapter, with the "
                "same resume_at"
            )
            mine.abort(reason)
            raise WriteError(reason)
        if failure is not None:
            error = _failed(party.name, failure)
            if party.transaction is not None:
                party.transaction.abort(str(error))
            raise error

    def offer(self, party: Party, handover: HandOver | None, ended: CommitEnd) -> None:
        """A party is ready. The last one to come commits all of them.

        Raises:
            WriteError: it was offered before.
        """
        joint = party.joint
        with self._lock:
            failure = joint.failure
            if failure is None:
                if party.ended is not None:
                    raise WriteError(
                        f"party {party.name.index} of the joint commit {party.name.name!r} is being committed already"
                    )
                party.handover, party.ended = handover, ended
                ready = [other for other in joint.parties.values() if other.ended is not None]
                if len(ready) < party.name.count:
                    return
                joint.is_over = True
                self._joints.pop(party.name.name, None)
        if failure is not None:
            error = _failed(party.name, failure)
            if party.transaction is not None:
                party.transaction.abort(str(error))
            ended(error)
            return
        self._commit_all(ready)

    def _commit_all(self, parties: list[Party]) -> None:
        commits = [(party.transaction, None, party.handover) for party in parties if party.transaction is not None]
        error: BaseException | None = None
        try:
            self._commit_together(commits)
        except Exception as refusal:
            error = refusal
            for transaction, _, _ in commits:
                transaction.abort(f"the joint commit {parties[0].name.name!r} failed: {refusal}")
        for party in parties:
            if party.ended is not None:
                failed = None if error is None else _failed(party.name, str(error))
                if failed is not None:
                    failed.__cause__ = error
                party.ended(failed)

    def fail(self, party: Party, reason: str) -> None:
        """A party gave up: all do. Without effect once all were committed, or one failed before."""
        joint = party.joint
        with self._lock:
            if joint.is_over or joint.failure is not None:
                return
            joint.failure = f"party {party.name.index} of {party.name.count} gave up: {reason}"
            joint.forget_at = Deadline.after(JOINT_OUTCOME_GRACE_S)
            joint.told.update(joint.parties)
            parties = list(joint.parties.values())
            self._forget_if_told(party.name.name, joint, party.name.count)
        for other in parties:
            if other.transaction is not None:
                other.transaction.abort(f"the joint commit {party.name.name!r} failed: {joint.failure}")
        for other in parties:
            if other.ended is not None:
                other.ended(_failed(other.name, joint.failure))

    def _forget_if_told(self, name: str, joint: _Joint, count: int) -> None:
        if len(joint.told) >= count:
            self._joints.pop(name, None)

    def _forget_old(self) -> None:
        old = [name for name, joint in self._joints.items() if joint.forget_at and joint.forget_at.has_passed]
        for name in old:
            del self._joints[name]

    def close(self, error: KVStoreError) -> None:
        """The pool is closed: whoever waits is told."""
        with self._lock:
            waiting = [party for joint in self._joints.values() for party in joint.parties.values()]
            for joint in self._joints.values():
                joint.failure = str(error)
            self._joints.clear()
        for party in waiting:
            if party.ended is not None:
                party.ended(error)


def _failed(name: JointName, failure: str) -> JointCommitError:
    return JointCommitError(
        f"the joint commit {name.name!r} failed, and nothing of it became visible: {failure}; "
        "write again under another name"
    )
