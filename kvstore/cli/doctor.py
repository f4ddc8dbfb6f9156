"""`kvstore doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvstore._version import __version__
from kvstore.cli.machine import machine_findings
from kvstore.cli.parts import part_findings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.cli.finding import Finding

EXIT_UNAVAILABLE = 1
EXIT_UNKNOWN_NAME = 2


def run_doctor(required: Sequence[str], *, as_json: bool) -> int:
    """Print what was found; the exit status."""
    findings = [*machine_findings(), *part_findings()]
    wanted: list[Finding] = [finding for finding in findings if finding.is_demanded]
    for name in required:
        named = find(findings, name)
        if not named:
            names = ", ".join(finding.name for finding in findings)
            print(f"kvstore doctor: nothing is called {name!r} here; known are: {names}", file=sys.stderr)
            return EXIT_UNKNOWN_NAME
        wanted.extend(named)
    missing = list(dict.fromkeys(finding for finding in wanted if not finding.is_available))
    if as_json:
        document = {
            "version": __version__,
            "findings": [asdict(finding) for finding in findings],
            "missing": [finding.name for finding in missing],
        }
        print(json.dumps(document, indent=2))
    else:
        _print_table(findings)
    for finding in missing:
        reason = finding.why_not_better or finding.offered
        print(f"kvstore doctor: {finding.name} is asked for and unavailable: {reason}", file=sys.stderr)
    return EXIT_UNAVAILABLE if missing else 0


def find(findings: Sequence[Finding], name: str) -> list[Finding]:
    """The finding of this name; or, without a dot, those whose last part it is."""
    exact = [finding for finding in findings if finding.name == name]
    return exact or [finding for finding in findings if finding.name.rpartition(".")[2] == name]


def _print_table(findings: Sequence[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 140)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"kvstore {__version__}", title_justify="left")
    for column in ("", "name", "offered", "in use", "why not better"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = Text("yes", "green") if finding.is_available else Text("no", "yellow")
        cells = (finding.name, finding.offered, finding.in_use, finding.why_not_better)
        table.add_row(mark, *(Text(cell) for cell in cells))
    console.print(table)
