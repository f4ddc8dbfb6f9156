"""Writes the table of kvstore/limits.py into docs/limits.md, between its two markers; a test compares them.

Usage: python scripts/limits_table.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = ROOT / "kvstore" / "limits.py"
PAGE = ROOT / "docs" / "limits.md"
BEGIN, END = "<!-- limits: begin -->", "<!-- limits: end -->"
UNITS = ("KIB", "MIB", "GIB")


def table(source: str) -> str:
    """A section per comment of the module, a row per limit: name, value, what it means."""
    module: dict[str, object] = {}
    exec(compile(source, "limits.py", "exec"), module)  # our own constants
    sections = {number: line[2:] for number, line in enumerate(source.splitlines(), 1) if line.startswith("# ")}
    parts: list[str] = []
    statements = ast.parse(source).body
    last = 0
    for statement, after in zip(statements, [*statements[1:], None], strict=True):
        if not isinstance(statement, ast.Assign):
            continue
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        if target.id in UNITS:
            continue
        for number, title in sections.items():
            if last < number < statement.lineno:
                parts.append(f"\n### {title}\n\n| limit | value | |\n|---|---|---|")
        last = statement.lineno
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = " ".join(str(after.value.value).split()) if is_text else ""
        parts.append(f"| `{target.id}` | {shown(target.id, module[target.id])} | {text} |")
    return "\n".join(parts).strip()


def shown(name: str, value: object) -> str:
    """A value as people read it."""
    if "BYTES" in name and isinstance(value, int):
        for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
            if value >= 1 << exponent and not value % (1 << exponent):
                return f"{value >> exponent} {unit}"
    if isinstance(value, float):
        return f"{value:g} s" if name.endswith(("_S", "_S_MAX")) else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def page(text: str, source: str) -> str:
    """The page with the table as it should be."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table(source)}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), LIMITS.read_text()))
