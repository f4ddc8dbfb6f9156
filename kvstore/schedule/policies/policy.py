"""The seam of routing: a policy keeps what it remembers in a value that its caller passes in and gets back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

MemoryT = TypeVar("MemoryT")
"""What a policy remembers from one observation to the next: a frozen value."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Where the seconds until the first token are expected to go, in the order in which they pass.

    A prompt has its place in the queue while its prefix is on its way: `queue_s` is what it waits after that.
    """

    load_s: float = 0.0
    prefix_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_wait_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Until the decoding cluster can go on from the first token, which comes with the hand-over."""
        return self.load_s + self.prefix_s + self.queue_s + self.prefill_s + self.transfer_s + self.decode_wait_s


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Attributes:
        prefill: the cluster that prefills.
        decode: the cluster that decodes.
        resume_tokens: the length that prefill begins at.
        prefix_from: the cluster from which that prefix is moved first; None where it is in `prefill` already.
        prefix_bytes: that cross for it.
        handover_bytes: that cross from `prefill` to `decode`.
    """

    prefill: str
    decode: str
    resume_tokens: int
    prefix_from: str | None
    prefix_bytes: float
    handover_bytes: float
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Scored:
    """A route that was considered.

    Attributes:
        score: what the policy minimizes, in the unit that its explanation names.
        against: why it was not taken, in a few words; empty for the one that was.
    """

    route: Route
    score: float
    against: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a decision is what it is.

    Attributes:
        policy: its name.
        rule: which of its rules decided, in a few words, with the numbers that it compared.
        candidates: what was considered, the best first.
        inputs: the remembered values that went in (mode, coefficients, threshold), by name.
    """

    policy: str
    rule: str
    candidates: tuple[Scored, ...]
    inputs: tuple[tuple[str, float | str], ...] = ()


class Decision:
    """A route, or None for a request that is turned away at once, and why.

    The explanation may be given as a function, which is called when somebody asks: most decisions are never asked
    about, and saying why costs more than deciding. Since policies are pure it may just decide again, and take notes.
    """

    __slots__ = ("_explanation", "route")

    def __init__(self, route: Route | None, explanation: Explanation | Callable[[], Explanation]) -> None:
        self.route = route
        self._explanation = explanation

    @property
    def explanation(self) -> Explanation:
        """Inputs, candidates, scores, and which rule decided. Any thread may call."""
        if not isinstance(self._explanation, Explanation):
            self._explanation = self._explanation()
        return self._explanation

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Decision):
            return NotImplemented
        return self.route == other.route and self.explanation == other.explanation

    def __hash__(self) -> int:
        return hash(self.route)

    def __repr__(self) -> str:
        return f"Decision({self.route!r})"


class RoutingPolicy(ABC, Generic[MemoryT]):
    """Decides where requests go. Methods are pure: equal arguments, equal answers. Any thread may call.

    `kvstore.testing.routing` is the conformance kit.
    """

    name: str

    @abstractmethod
    def begin(self) -> MemoryT:
        """What is remembered before anything was observed."""

    @abstractmethod
    def observe(self, memory: MemoryT, snapshot: Snapshot) -> MemoryT:
        """What to remember after a look at the system; called every second or so, not for each request."""

    def numbers(self, memory: MemoryT) -> Mapping[str, float]:
        """What of its memory is worth watching over time, by name."""
        return {}

    @abstractmethod
    def route(self, memory: MemoryT, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        """Where this request goes. A route only ever names clusters that work, links that exist and are up."""
