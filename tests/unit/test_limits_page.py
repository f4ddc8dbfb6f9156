"""docs/limits.md lists every limit with its value."""

from __future__ import annotations

from kvstore import limits
from scripts.limits_table import LIMITS, PAGE, UNITS, page, shown, table


def test_the_page_says_what_the_module_does() -> None:
    text = PAGE.read_text()
    assert text == page(text, LIMITS.read_text()), "run: python scripts/limits_table.py"


def test_every_limit_has_a_row() -> None:
    names = {name for name in vars(limits) if name.isupper()} - set(UNITS)
    rows = [line.split("`")[1] for line in table(LIMITS.read_text()).splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(names)


def test_values_are_shown_with_their_units() -> None:
    assert shown("A_BYTES_MAX", 3 << 20) == "3 MiB"
    assert shown("A_BYTES_MAX", 1000) == "1,000"
    assert shown("A_DEADLINE_S", 0.5) == "0.5 s"
    assert shown("A_FRACTION_MAX", 0.25) == "0.25"
    assert shown("A_COUNT_MAX", 1 << 16) == "65,536"
