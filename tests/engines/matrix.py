"""What a cell of the matrix is, and how it is judged: against a reference, with a spread and a control."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Verdict(StrEnum):
    EQUAL = "equal"
    WITHIN_SPREAD = "within spread"
    HOLDS = "holds"  # a property, nothing to compare
    DIFFERENT = "DIFFERENT"
    BROKEN = "BROKEN"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Answer:
    """What an engine said to one request.

    Attributes:
        tokens: sampled ids.
        logprobs: of each sampled token, the logprobs of the most likely ids, as {id: logprob}.
        cached_tokens: prompt tokens that it did not compute.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    cached_tokens: int = 0


@dataclass(frozen=True)
class Cell:
    """One line of the report.

    Attributes:
        difference: largest difference between logprobs of the case and of its reference.
        spread: the same between two runs of the engine without kvstore; None where it has to be 0.
        control: difference of the same case with a fault put in below the adapter; None where there is none.
        figures: what else was measured.
    """

    engine: str
    model: str
    case: str
    verdict: Verdict
    difference: float | None = None
    spread: float | None = None
    control: float | None = None
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def is_caught(self) -> bool | None:
        """Whether the control differed, and by more than the spread. None without a control."""
        return None if self.control is None else self.control > 2 * max(self.spread or 0.0, self.difference or 0.0)

    @property
    def is_good(self) -> bool:
        if self.verdict in (Verdict.DIFFERENT, Verdict.BROKEN):
            return False
        return self.is_caught is not False


def distance(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    """Largest difference of logprobs up to and with the first token that differs; infinite where nothing compares.

    A different token ends the comparison of that answer: what follows has another context. The step where tokens
    part counts, by the logprobs that both list; an id that only one of them lists says at least that it moved past
    the others, and counts by its distance from the other's least likely one.
    """
    if len(one) != len(other):
        return math.inf
    worst = 0.0
    for left, right in zip(one, other, strict=True):
        if len(left.tokens) != len(right.tokens) or not left.tokens:
            return math.inf
        for step in range(len(left.tokens)):
            worst = max(worst, _step(left.logprobs[step], right.logprobs[step]))
            if left.tokens[step] != right.tokens[step]:
                break
    return worst


def _step(left: dict[int, float], right: dict[int, float]) -> float:
    least_left, least_right = min(left.values()), min(right.values())
    return max(abs(left.get(key, least_left) - right.get(key, least_right)) for key in left.keys() | right.keys())


def judge(
    engine: str,
    model: str,
    case: str,
    *,
    reference: Sequence[Answer],
    answers: Sequence[Answer],
    spread: float = 0.0,
    control: Sequence[Answer] | float | None = None,
    broken: Sequence[str] = (),
    figures: dict[str, float] | None = None,
) -> Cell:
    """Compare with the reference, and the control with it as well.

    Args:
        spread: what the engine itself differs by, without kvstore; 0 asks for the same bits.
        control: answers of the same case with a fault put in; or, where it has a reference of its own, how far apart
            they are.
        broken: what else should have held and did not.
    """
    difference = distance(reference, answers)
    if broken:
        verdict = Verdict.BROKEN
    elif difference == 0.0:
        verdict = Verdict.EQUAL
    elif difference <= spread:
        verdict = Verdict.WITHIN_SPREAD
    else:
        verdict = Verdict.DIFFERENT
    return Cell(
        engine,
        model,
        case,
        verdict,
        difference,
        spread or None,
        control if control is None or isinstance(control, float) else distance(reference, control),
        "; ".join(broken),
        figures or {},
    )


def holds(engine: str, model: str, case: str, broken: Sequence[str], figures: dict[str, float] | None = None) -> Cell:
    """A cell about properties alone."""
    verdict = Verdict.BROKEN if broken else Verdict.HOLDS
    return Cell(engine, model, case, verdict, reason="; ".join(broken), figures=figures or {})


def not_run(engine: str, model: str, case: str, reason: str) -> Cell:
    return Cell(engine, model, case, Verdict.NOT_RUN, reason=reason)
