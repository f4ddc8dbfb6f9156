"""What another node has, and what fetching it was like."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvstore.spec import WHOLE, ChunkGrid, Shard

if TYPE_CHECKING:
    from kvstore.pool import Prompt
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.query import RemoteCandidate


@dataclass(frozen=True)
class RemoteMatch:
    """The answer to "how much of this prompt is there?" of another node. True if anything is.

    It is what was true when the node answered; nothing is held there.

    Attributes:
        address: the node.
        prompt: what was asked about.
        candidates: resume points that it has, deepest first.
        pending_tokens: a deeper resume point that a writer there will commit; 0 if none. Never a hit.
        round_trip_s: from the question to the answer.
        bytes_per_s: what fetches from there have reached in this process; None before any.
        shard, grid: whose share was asked for, and the chunk boundaries that were insisted on.
    """

    address: str
    prompt: Prompt = field(repr=False)
    candidates: tuple[RemoteCandidate, ...]
    pending_tokens: int
    round_trip_s: float
    bytes_per_s: float | None = None
    shard: Shard = WHOLE
    grid: ChunkGrid | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return bool(self.candidates)

    @property
    def tokens(self) -> int:
        """Length of the deepest resume point there; 0 for a miss."""
        return self.candidates[0].tokens if self.candidates else 0

    @property
    def size_bytes(self) -> int:
        """What restoring it moves; a fetch moves as much of it as is missing here."""
        return self.candidates[0].size_bytes if self.candidates else 0

    @property
    def tier(self) -> str | None:
        """The slowest tier that any of it lies in."""
        return self.candidates[0].tier if self.candidates else None

    @property
    def expected_s(self) -> float | None:
        """Time to fetch all of the deepest one, from what fetching from there has cost; None before any."""
        if not self.candidates or self.bytes_per_s is None:
            return None
        best = self.candidates[0]
        return best.ready_us / 1e6 + self.round_trip_s + best.size_bytes / self.bytes_per_s

    def at(self, tokens: int) -> RemoteMatch:
        """The same answer, resuming at another candidate.

        Raises:
            ValueError: there is no candidate of that length.
        """
        for number, candidate in enumerate(self.candidates):
            if candidate.tokens == tokens:
                return replace(self, candidates=self.candidates[number:])
        lengths = ", ".join(str(candidate.tokens) for candidate in self.candidates) or "none"
        raise ValueError(f"{self.address} named no resume point of {tokens} tokens; it named: {lengths}")


@dataclass(frozen=True)
class FetchReport:
    """The result of a fetch that did not fail. Times are of this process's monotonic clock.

    Attributes:
        address: the node that was asked.
        tokens: the resume point that came from there; 0 if none did: a miss, or nothing deeper than what was here.
        local_tokens: the deepest resume point here when it ended.
        transfer: what brought it; None if none was needed.
        received_bytes, received_pieces: what crossed.
        reconnects: connections beyond the first.
        transfer_s: from the offer to the commit.
        is_shared: another fetch, which was under way already, brought it; that one's report has the bytes.
        started_s, ended_s: `fetch` was called; the resume point was committed here, or there was nothing to do.
    """

    address: str
    tokens: int
    local_tokens: int
    started_s: float
    ended_s: float
    transfer: TransferId | None = None
    received_bytes: int = 0
    received_pieces: int = 0
    reconnects: int = 0
    transfer_s: float = 0.0
    is_shared: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_s - self.started_s
