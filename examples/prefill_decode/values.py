"""What the processes of the demo tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ready:
    """A process has its model and its store.

    Attributes:
        parameters: number of the model's parameters.
        fingerprint: of the model spec, in hex; equal in both processes.
        groups: a line about each cache group.
        layers: layer numbers, each with a word about its cache.
        address: where the store listens; empty if it does not.
    """

    parameters: int
    fingerprint: str
    groups: tuple[str, ...]
    layers: dict[int, str]
    address: str


@dataclass(frozen=True)
class Prompt:
    """One prompt of the demo.

    Attributes:
        name: for people.
        token_ids: the ids.
        shared_tokens: how many first ids it has in common with the first prompt.
        question: what it asks, if its ids mean something.
    """

    name: str
    token_ids: tuple[int, ...]
    shared_tokens: int
    question: str | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Decoded:
    """Greedily decoded tokens and the logits that each was chosen from, `[tokens, vocabulary]` float32."""

    tokens: tuple[int, ...]
    logits: Logits


@dataclass(frozen=True)
class Uncached:
    """A prompt run by one process without the library. `prefill_s` is its time to the first token."""

    decoded: Decoded
    prefill_s: float


@dataclass(frozen=True)
class Matched:
    """What the prefill process's store answered for a prompt, and why not more."""

    tokens: int
    attention_tokens: int
    other_tokens: tuple[int, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A time in which something happened to a layer, on the machine's monotonic clock, for the timeline.

    Attributes:
        kind: `compute`, `send` or `receive`.
        layer: layer number.
        start_s, end_s: when.
        size_bytes: bytes that this made, sent or received.
        chunk: the token range that was computed; None for bytes on their way.
    """

    kind: str
    layer: int
    start_s: float
    end_s: float
    size_bytes: int
    chunk: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sent:
    """A prompt that the prefill process computed and handed over. Times are of the monotonic clock.

    Attributes:
        matched: what its store had.
        checkpoints: lengths at which states were stored.
        bytes_by_group: bytes that crossed, by cache group.
        started_s, computed_s, committed_s: asked for; last logits there; the decode process has everything.
        export_s: time in which the model waited for the store.
        bars: for the timeline.
    """

    matched: Matched
    checkpoints: tuple[int, ...]
    bytes_by_group: dict[str, int]
    started_s: float
    computed_s: float
    committed_s: float
    export_s: float
    bars: tuple[Bar, ...]

    @property
    def prefill_s(self) -> float:
        return self.computed_s - self.started_s

    @property
    def exposed_s(self) -> float:
        """From the end of the prefill to the acknowledged commit."""
        return self.committed_s - self.computed_s

    @property
    def sent_bytes(self) -> int:
        return sum(self.bytes_by_group.values())


@dataclass(frozen=True)
class Resumed:
    """A prompt that the decode process took over.

    Attributes:
        decoded: what it decoded.
        restore_s: from the commit's notice to the first token.
        resumed_tokens: length of what it restored.
        text: the decoded tokens as text, if the model has a tokenizer.
        damaged: what came out of a copy in which one state was zeroed, and what was zeroed; if asked for.
        bars: for the timeline.
    """

    decoded: Decoded
    restore_s: float
    resumed_tokens: int
    text: str | None
    damaged: Damaged | None
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Damaged:
    """A continuation of a deliberately damaged copy."""

    what: str
    decoded: Decoded
