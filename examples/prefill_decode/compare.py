"""Whether two continuations are the same, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .values import Decoded


@dataclass(frozen=True)
class Comparison:
    """What differs between two continuations.

    Attributes:
        steps: tokens compared.
        first_token: number of the first decoded token that differs; None if all are equal.
        first_logits: number of the first row of logits that differs in any bit; None if all are equal.
        largest_difference: between two logits.
    """

    steps: int
    first_token: int | None
    first_logits: int | None
    largest_difference: float

    @property
    def is_exact(self) -> bool:
        return self.first_token is None and self.first_logits is None

    def __str__(self) -> str:
        if self.is_exact:
            return f"all {self.steps} tokens equal, all logits bit for bit equal"
        tokens = "all tokens equal" if self.first_token is None else f"tokens differ from number {self.first_token} on"
        return f"{tokens}, logits from number {self.first_logits} on (by up to {self.largest_difference:.3g})"


def compare(expected: Decoded, found: Decoded) -> Comparison:
    """Compare token for token, and the logits bit for bit."""
    steps = min(len(expected.tokens), len(found.tokens))
    pairs = list(zip(expected.tokens, found.tokens, strict=False))
    first_token = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    if first_token is None and len(expected.tokens) != len(found.tokens):
        first_token = steps
    one, other = (np.ascontiguousarray(decoded.logits[:steps], np.float32) for decoded in (expected, found))
    if one.shape != other.shape:
        return Comparison(steps, first_token, 0, float("inf"))
    # Compared as integers: as numbers, NaN would differ from itself, and -0 would equal 0.
    rows = (one.view(np.uint32) != other.view(np.uint32)).any(axis=1)
    first_logits = int(rows.argmax()) if rows.any() else None
    return Comparison(steps, first_token, first_logits, float(np.abs(one - other).max()))
