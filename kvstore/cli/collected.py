"""What pieces of work over processes came to, those that an interrupt left undone included."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from kvstore.cli.printing import printable
from kvstore.cli.progress import PointsProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.simulate.workers import Ended

ValueT = TypeVar("ValueT")

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class Collected(Generic[ValueT]):
    """In the order of the work.

    Attributes:
        values: of what was done.
        failures: name and reason of what was not.
        was_interrupted: whether Ctrl-C came before all had ended.
    """

    values: tuple[ValueT, ...]
    failures: tuple[tuple[str, str], ...]
    was_interrupted: bool

    @classmethod
    def of(
        cls, names: Sequence[str], work: Callable[[Callable[[int, Ended[ValueT]], None]], object]
    ) -> Collected[ValueT]:
        """Do the work, with its progress on standard error, until it is done or interrupted.

        Args:
            names: of the pieces.
            work: does them all, and tells of each that ends, by number.
        """
        found: dict[int, Ended[ValueT]] = {}
        was_interrupted = False
        with PointsProgress(names) as progress:

            def ended(number: int, how: Ended[ValueT]) -> None:
                found[number] = how
                progress(number, how)

            try:
                work(ended)
            except KeyboardInterrupt:
                was_interrupted = True
        values = tuple(each.value for _, each in sorted(found.items()) if each.value is not None)
        failures = tuple(
            (name, found[number].error if number in found else "interrupted before it had ended")
            for number, name in enumerate(names)
            if number not in found or found[number].value is None
        )
        return cls(values, failures, was_interrupted)

    def told(self) -> int:
        """Say on standard error what was not done; the exit status."""
        for name, error in self.failures:
            print(f"kvstore simulate: {name}: {printable(error)}", file=sys.stderr)
        if self.was_interrupted:
            return INTERRUPTED
        return 1 if self.failures else 0
