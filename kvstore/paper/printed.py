"""Figures as the paper prints them, and the interval that each was rounded from."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources

_ROUNDING = 1e-9
"""Of a half step: float64 has no 2.445."""


@dataclass(frozen=True)
class Printed:
    """One printed figure.

    Attributes:
        table, row, quantity: where it stands; the quantity's name ends in its unit.
        value: in that unit.
        step: of its last digit; 0 for a count, which is exact.
    """

    table: str
    row: str
    quantity: str
    value: float
    step: float

    def relative_error(self, ours: float) -> float:
        """0 within the interval that rounds to the printed figure, else the distance to its nearer end / the figure."""
        half = self.step / 2 * (1 + _ROUNDING)
        return max(abs(ours - self.value) - half, 0.0) / abs(self.value)


def printed_figures() -> tuple[Printed, ...]:
    """All that something computed here stands beside, in the order of the paper's tables.

    Figures that a profile was made of are left out, since agreeing with them shows nothing but that they were copied
    rightly: the prefill seconds of the 1T model, and KV throughput of six models.
    """
    file = resources.files("kvstore.paper").joinpath("printed.toml")
    found = []
    for table in tomllib.loads(file.read_text(encoding="utf-8"))["tables"]:
        for number, row in enumerate(table["rows"]):
            for quantity, texts in table["quantities"].items():
                if texts[number]:
                    scale = Decimal(str(table.get("scales", {}).get(quantity, 1)))
                    step = 0.0 if quantity in table.get("counts", ()) else step_of(texts[number]) * float(scale)
                    value = float(Decimal(texts[number]) * scale)
                    found.append(Printed(table["name"], row, quantity, value, step))
    return tuple(found)


def step_of(text: str) -> float:
    """What one more in the last digit of a printed figure is: 0.01 for `2.45`, 1 for `44`."""
    _, _, digits = text.partition(".")
    return 10.0 ** -len(digits)
