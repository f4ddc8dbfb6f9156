"""Prints what the development environment needs: build requirements, dependencies and the extras named as arguments.

They are installed apart from the project itself, so that a changed C++ file rebuilds just the native module.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: dict[str, dict[str, object]], extras: list[str]) -> list[str]:
    """All requirements as one list; extras that name the project's own extras are resolved."""
    project = pyproject["project"]
    optional = project["optional-dependencies"]
    dependencies = project["dependencies"]
    build = pyproject["build-system"]["requires"]
    assert isinstance(optional, dict)
    assert isinstance(dependencies, list)
    assert isinstance(build, list)
    found = [*build, "cmake>=3.21", "ninja", *dependencies]
    waiting = list(extras)
    while waiting:
        for requirement in optional[waiting.pop()]:
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
            if own:
                waiting.extend(name.strip() for name in own[1].split(","))
            else:
                found.append(requirement)
    return sorted(set(found))


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    print("\n".join(requirements(tomllib.loads((root / "pyproject.toml").read_text()), sys.argv[1:])))
