"""What a state machine draws where other threads change what there is to choose from.

Hypothesis runs the same choices again, to make a failure small and to find the next example, and ends a run whose
draws have another shape then. So nothing is drawn from what is there: a number of a fixed range stands for one of it,
and a rule that finds nothing to work on returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

CHOICE = st.integers(0, 255)
"""Stands for one of however many there are when the rule runs."""


def chosen(items: Sequence[T], choice: int) -> T:
    """The item that a choice stands for; there is at least one."""
    return items[choice % len(items)]
