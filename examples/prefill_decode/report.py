"""The tables at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .compare import Comparison
    from .values import Prompt, Sent, Uncached


@dataclass(frozen=True)
class Run:
    """Everything about one prompt that was handed over.

    Attributes:
        forwarded: the store-and-forward control, if it was run for this prompt.
    """

    prompt: Prompt
    uncached: Uncached
    sent: Sent
    comparison: Comparison
    forwarded: Sent | None = None

    @property
    def throughput_gbps(self) -> float:
        """Φ: bits that leave per second of prefill."""
        return self.sent.sent_bytes * 8 / self.sent.prefill_s / 1e9


def result_table(runs: list[Run]) -> Table:
    """A column for each prompt, a row for each quantity."""
    table = Table(title="From prefill to decode", box=SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.prompt.name, justify="right", no_wrap=True)
    for title, cells in _rows(runs):
        table.add_row(title, *cells)
    return table


def _rows(runs: list[Run]) -> Iterator[tuple[str, list[str]]]:
    def row(title: str, cell: Callable[[Run], str]) -> tuple[str, list[str]]:
        return title, [cell(run) for run in runs]

    yield row("prompt, tokens", lambda run: f"{len(run.prompt):,}")
    yield row("shared with the first prompt", lambda run: "-" if run is runs[0] else f"{run.prompt.shared_tokens:,}")
    yield row("attention in the store reaches", lambda run: f"{run.sent.matched.attention_tokens:,}")
    yield row("resumed at; the rest was computed", lambda run: _tokens(run.sent.matched.tokens))
    yield row("other resume points", lambda run: few(run.sent.matched.other_tokens))
    yield row("states stored at", lambda run: few(run.sent.checkpoints))
    for name in runs[0].sent.bytes_by_group:
        yield row(f"crossed to decode: {name}", lambda run, name=name: format_bytes(run.sent.bytes_by_group[name]))  # type: ignore[misc]
    yield row("KV throughput Φ: crossed / prefill, Gbit/s", lambda run: f"{run.throughput_gbps:.4f}")
    yield row("exposed: end of prefill to commit, ms", lambda run: f"{run.sent.exposed_s * 1e3:.0f}")
    yield row("the same, store and forward, ms", _forwarded_ms)
    yield row("time to first token without the store, s", lambda run: f"{run.uncached.prefill_s:.2f}")
    yield row("time to first token with it, s", lambda run: f"{run.sent.prefill_s:.2f}")
    yield row("of that, waiting for the store, ms", lambda run: f"{run.sent.export_s * 1e3:.0f}")
    yield row("decoded as one process alone does", lambda run: "bit for bit" if run.comparison.is_exact else "NO")


def _forwarded_ms(run: Run) -> str:
    return "-" if run.forwarded is None else f"{run.forwarded.exposed_s * 1e3:.0f}"


def _tokens(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "-"


def few(lengths: tuple[int, ...]) -> str:
    """The first of some lengths."""
    shown = ", ".join(f"{length:,}" for length in lengths[:3])
    return f"{shown} ..." if len(lengths) > 3 else shown or "-"
