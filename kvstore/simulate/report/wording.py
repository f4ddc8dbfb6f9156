"""Figures in words: the same on pages and on the terminal."""

from __future__ import annotations

MISSING = "—"


def seconds(value: float | None) -> str:
    """`1.23 s`, `45.0 ms`; a dash for none."""
    if value is None:
        return MISSING
    return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def rate(value: float | None) -> str:
    """Requests per second."""
    return MISSING if value is None else f"{value:.3g}/s"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value * 100:.1f} %"


def gbits(bytes_per_s: float | None) -> str:
    return MISSING if bytes_per_s is None else f"{bytes_per_s * 8 / 1e9:.3g} Gbit/s"


def tokens(value: float) -> str:
    return f"{value:,.0f}"


def number(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def stability(is_stable: bool) -> str:
    return "stable" if is_stable else "NOT STABLE"
