"""How long an answer is expected to be, by those that have ended: nobody knows it of a single one beforehand."""

from __future__ import annotations

from dataclasses import dataclass

_PRIOR_TOKENS = 256.0
_LATEST = 1000


@dataclass(frozen=True, slots=True)
class ExpectedAnswer:
    """Mean length of the answers that ended; a frozen value, whose next one `ended` gives. Any thread may call.

    Attributes:
        tokens: mean of the latest thousand or so; before any has ended, a few hundred, which count as one answer.
        answers: that went in.
    """

    tokens: float = _PRIOR_TOKENS
    answers: int = 0

    def ended(self, tokens: int) -> ExpectedAnswer:
        """With one more answer."""
        weight = 1 / (min(self.answers, _LATEST) + 2)
        return ExpectedAnswer(self.tokens + (tokens - self.tokens) * weight, self.answers + 1)
