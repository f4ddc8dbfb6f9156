"""Every printed figure beside the one computed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvstore.paper.case_study import Figure, inferred
from kvstore.paper.printed import Printed, printed_figures
from kvstore.profiles import load_profile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.paper.case_study import CaseStudy

Basis: TypeAlias = Literal["predicted", "inferred"]
"""What agreement shows. `predicted`: computed from printed inputs alone. `inferred`: through inputs that were
themselves inferred from the paper's tables, so that it shows the arithmetic rather than the model."""
BASES: tuple[Basis, ...] = ("predicted", "inferred")
_LENGTHS = {"1K": 1024, "8K": 8 * 1024, "32K": 32 * 1024, "128K": 128 * 1024}
_MIB = 1 << 20


@dataclass(frozen=True)
class Cell:
    """One printed figure and ours."""

    printed: Printed
    ours: float
    inferred_inputs: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """0 within rounding, else how far outside, as a share of the printed figure."""
        return self.printed.relative_error(self.ours)

    @property
    def basis(self) -> Basis:
        return "inferred" if self.inferred_inputs else "predicted"


@dataclass(frozen=True)
class Summary:
    """How well the cells of one basis agree."""

    basis: Basis
    cells: int
    within_rounding: int
    largest_error: float
    mean_error: float
    worst: Cell


def compared(study: CaseStudy) -> tuple[Cell, ...]:
    """All printed figures, in the order of the paper's tables.

    Args:
        study: `case_study()`, or one under other profiles or another convention.
    """
    figures = {**study.figures(), **_model_figures()}
    cells = []
    for printed in printed_figures():
        figure = figures[printed.table, printed.row, printed.quantity]
        cells.append(Cell(printed, figure.value, figure.inferred_inputs))
    return tuple(cells)


def summaries(cells: Iterable[Cell]) -> tuple[Summary, ...]:
    """One for each basis that occurs: predicted and inferred cells are never counted together."""
    by_basis: dict[Basis, list[Cell]] = {basis: [] for basis in BASES}
    for cell in cells:
        by_basis[cell.basis].append(cell)
    return tuple(
        Summary(
            basis=basis,
            cells=len(members),
            within_rounding=sum(cell.relative_error == 0 for cell in members),
            largest_error=max(cell.relative_error for cell in members),
            mean_error=sum(cell.relative_error for cell in members) / len(members),
            worst=max(members, key=lambda cell: cell.relative_error),
        )
        for basis, members in by_basis.items()
        if members
    )


def _model_figures() -> dict[tuple[str, str, str], Figure]:
    """Of the table of the internal 1T model."""
    profile = load_profile("paper-1t-h200")
    found = {}
    for row, tokens in _LENGTHS.items():
        kv, prefill = inferred(profile, "kv"), inferred(profile, "prefill")
        kv_gbps = profile.kv_throughput_bytes_per_s(tokens) * 8 / 1e9
        found["1T model", row, "kv_mib"] = Figure(profile.kv.total_bytes(tokens) / _MIB, kv)
        found["1T model", row, "kv_gbps"] = Figure(kv_gbps, (*prefill, *kv))
    return found
