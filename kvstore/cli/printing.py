"""Tables for people, of texts that come from files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH_CHARACTERS = 140
"""Of tables that are not written to a terminal."""


def printable(text: str) -> str:
    """Control characters of a file's names escaped, so that they reach no terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Names come from the file: as Text they cannot carry rich's markup.
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else WIDTH_CHARACTERS).print(table)
