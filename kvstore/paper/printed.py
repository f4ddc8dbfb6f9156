"""Figures as the paper prints them, and the interval that each was rounded from."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources

from kvstore.profiles import published_kv_throughput

_ROUNDING = 1e-9
"""Of a half step: float64 has no 2.445."""
KV_THROUGHPUT = "KV throughput"


@dataclass(frozen=True)
class Printed:
    """One printed figure.

    Attributes:
        table, row, quantity: where it stands; the quantity's name ends in its unit.
        value: in that unit.
        step: of its last digit; 0 for a count, which is exact.
        is_read_back: whether our profile was made of this very figure.
    """

    table: str
    row: str
    quantity: str
    value: float
    step: float
    is_read_back: bool = False

    def relative_error(self, ours: float) -> float:
        """0 within the interval that rounds to the printed figure, else the distance to its nearer end / the figure."""
        half = self.step / 2 * (1 + _ROUNDING)
        return max(abs(ours - self.value) - half, 0.0) / abs(self.value)


def printed_figures() -> tuple[Printed, ...]:
    """All of them, in the order of the paper's tables."""
    file = resources.files("kvstore.paper").joinpath("printed.toml")
    found = []
    for table in tomllib.loads(file.read_text(encoding="utf-8"))["tables"]:
        for number, row in enumerate(table["rows"]):
            for quantity, texts in table["quantities"].items():
                if texts[number]:
                    scale = Decimal(str(table.get("scales", {}).get(quantity, 1)))
                    step = 0.0 if quantity in table.get("counts", ()) else step_of(texts[number]) * float(scale)
                    is_read_back = quantity in table.get("read_back", ())
                    value = float(Decimal(texts[number]) * scale)
                    found.append(Printed(table["name"], row, quantity, value, step, is_read_back))
    for published in published_kv_throughput():
        # All of this table is printed with two digits after the point; the profiles' prefill times are made of it.
        found.extend(
            Printed(KV_THROUGHPUT, published.model, throughput_quantity(tokens), gbps, 0.01, is_read_back=True)
            for tokens, gbps in published.gbps
        )
    return tuple(found)


def throughput_quantity(tokens: int) -> str:
    """The name of Φ_kv at a length, in the table of six models."""
    return f"at_{tokens // 1024}k_gbps"


def step_of(text: str) -> float:
    """What one more in the last digit of a printed figure is: 0.01 for `2.45`, 1 for `44`."""
    _, _, digits = text.partition(".")
    return 10.0 ** -len(digits)
