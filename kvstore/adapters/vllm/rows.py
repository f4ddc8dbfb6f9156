"""Rows of an engine's host memory, to and from a foreign store: jobs that are begun, and asked after."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError, KVStoreError
from kvstore.foreign import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.adapters.vllm.tier_store import TierStore
    from kvstore.foreign import ForeignStatistics
    from kvstore.handle import Handle

LOG = logging.getLogger("kvstore.vllm")

GROUP_BYTES = 4
"""An offload key is a block's hash and, in so many bytes, the number of its cache group."""


def split_key(key: bytes) -> tuple[str, bytes]:
    """Group and block hash of an offload key."""
    return str(int.from_bytes(key[-GROUP_BYTES:], "big")), bytes(key[:-GROUP_BYTES])


@dataclass(frozen=True)
class Rows:
    """Where the rows lie.

    Attributes:
        address: of the first one.
        stride_bytes: from one to the next, and what of each is kept.
        count: how many there are.
    """

    address: int
    stride_bytes: int
    count: int

    def region(self, number: int) -> Region:
        """One row.

        Raises:
            IndexError: there is none of this number.
        """
        if not 0 <= number < self.count:
            raise IndexError(f"there are {self.count} rows, and none of number {number}")
        return Region(self.address + number * self.stride_bytes, self.stride_bytes)


@dataclass(frozen=True)
class JobEnd:
    """How a job has ended.

    Attributes:
        job_id: the engine's number.
        is_load: whether rows were to be filled.
        keys: what it was about.
        has_come: which of these were stored, or loaded.
        seconds: from its begin.
    """

    job_id: int
    is_load: bool
    keys: tuple[bytes, ...]
    has_come: tuple[bool, ...]
    seconds: float


@dataclass
class _Job:
    is_load: bool
    keys: tuple[bytes, ...]
    handle: Handle[list[bool]] | None
    began_s: float


class RowJobs:
    """Stores and loads rows behind its caller's back. For one thread, a scheduler's, which never waits here.

    Args:
        source: where they are kept.
        rows: of the engine.
        load_deadline_s: for a load.
    """

    def __init__(self, source: TierStore, rows: Rows, *, load_deadline_s: float) -> None:
        self._source = source
        self._rows = rows
        self._load_deadline_s = load_deadline_s
        self._jobs: dict[int, _Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Which rows are there; none while the store is gone. Quick in the process that owns the store."""
        store = self._source.current()
        if store is None:
            return [False] * len(keys)
        groups, hashes = zip(*map(split_key, keys), strict=True)
        try:
            return store.has(groups, hashes)
        except KVStoreError:
            return [False] * len(keys)

    def begin(self, job_id: int, keys: Sequence[bytes], rows: Sequence[int], *, is_load: bool) -> None:
        """Begin to load or to store rows."""
        job = _Job(is_load, tuple(keys), None, time.monotonic())
        self._jobs[job_id] = job
        store = self._source.current()
        if store is None:
            return
        groups, hashes = zip(*map(split_key, keys), strict=True)
        memories = [self._rows.region(int(number)) for number in rows]
        try:
            if is_load:
                job.handle = store.get_async(groups, hashes, memories, deadline_s=self._load_deadline_s)
            else:
                job.handle = store.put_async(groups, hashes, memories)
        except KVStoreError:
            return  # closed in this moment: nothing came of it

    def finished(self) -> list[JobEnd]:
        """The jobs that have ended since this was asked last."""
        ended = [(job_id, job) for job_id, job in self._jobs.items() if job.handle is None or job.handle.done()]
        return [self._end(job_id, job) for job_id, job in ended]

    def _end(self, job_id: int, job: _Job) -> JobEnd:
        del self._jobs[job_id]
        has_come = [False] * len(job.keys)
        if job.handle is not None:
            try:
                has_come = job.handle.result(0.0)
            except Exception as error:  # whatever it is, the rows are computed instead
                what = "load" if job.is_load else "store"
                LOG.warning("a job to %s %d rows failed: %s", what, len(job.keys), error)
        return JobEnd(job_id, job.is_load, job.keys, tuple(has_come), time.monotonic() - job.began_s)

    def drain(self, deadline_s: float) -> None:
        """Wait until no job touches a row any more; their ends are told by `finished`.

        Raises:
            DeadlineError: one still does.
        """
        for job in list(self._jobs.values()):
            if job.handle is not None and not job.handle.done():
                _wait(job.handle, deadline_s)

    def statistics(self) -> ForeignStatistics | None:
        """Counters of the store; None while it is gone."""
        store = self._source.current()
        return None if store is None else store.statistics()


def _wait(handle: Handle[list[bool]], deadline_s: float) -> None:
    try:
        handle.result(deadline_s)
    except DeadlineError:
        if not handle.done():
            raise
    except Exception:
        return  # it has ended, which is what was waited for; `finished` says how
