"""Imports point one way; each package knows only the layers below it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A package may import those listed before it, and itself. What stands in one group is on one level.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("kvstore._version", "kvstore._native", "kvstore.errors", "kvstore.limits", "kvstore.units"),
    ("kvstore.clock", "kvstore.documents", "kvstore.wire", "kvstore.profile"),
    ("kvstore.schedule",),
    ("kvstore.handle",),
    ("kvstore.events", "kvstore.metrics"),
    ("kvstore.spec",),
    ("kvstore.abc", "kvstore.keys"),
    ("kvstore.registry", "kvstore.record", "kvstore.codec"),
    ("kvstore.tiers",),
    ("kvstore.pool",),
    ("kvstore.placement",),
    ("kvstore.attached",),
    ("kvstore.store", "kvstore.transfer"),
    ("kvstore.foreign",),
    ("kvstore",),
    ("kvstore.profiles",),
    ("kvstore.scenario", "kvstore.paper"),
    ("kvstore.workload",),
    ("kvstore.simulate",),
    ("kvstore.bench", "kvstore.cluster"),
    ("kvstore.adapters.paged",),
    ("kvstore.adapters",),
    ("kvstore.cli", "kvstore.testing"),
    ("kvstore.__main__",),
)
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}

# Implementations of a seam see the seam, and never each other or the library above it.
TRANSPORTS_MAY_IMPORT = {"kvstore.abc", "kvstore.errors", "kvstore.limits", "kvstore.clock", "kvstore._native"}

# Plans and policies are functions of their arguments: no I/O, clock, chance or threads, and nothing of the store.
PURE_MAY_IMPORT = {"kvstore.schedule", "kvstore.profile", "kvstore.errors", "kvstore.limits"} | {
    *("__future__", "abc", "bisect", "collections", "dataclasses", "functools", "itertools", "math", "operator"),
    *("statistics", "struct", "typing", "zlib", "numpy"),
}


def package_of(module: str) -> str:
    """The layer that a module belongs to: its longest listed prefix."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in RANK:
            return ".".join(parts[:length])
    raise AssertionError(f"{module} belongs to no layer; add its package to LAYERS in {Path(__file__).name}")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, top_level_only: bool) -> set[str]:
    """Modules that a file imports, those for type checking left out."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            existing = {name for name in submodules if _exists(name)}
            found.update(existing or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def _exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


LIBRARY = sorted((ROOT / "kvstore").rglob("*.py"))
TRANSPORTS = sorted((ROOT / "transports").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    own = package_of(module_of(path))
    for module in imports_of(path, top_level_only=True):
        if module.split(".")[0] == "kvstore":
            other = package_of(module)
            assert other == own or RANK[other] < RANK[own], f"{module_of(path)} imports {module}, which is not below it"
        assert module.split(".")[0] not in ("torch", "transformers") or own == "kvstore.adapters" or "testing" in own, (
            f"{module_of(path)} imports {module} at import time; only adapters may"
        )
        assert module.split(".")[0] != "transports", "transports are found through the registry"


@pytest.mark.parametrize("path", TRANSPORTS, ids=module_of)
def test_transports_see_only_the_seam(path: Path) -> None:
    own = ".".join(module_of(path).split(".")[:2])
    for module in imports_of(path, top_level_only=False):
        if module.split(".")[0] == "kvstore":
            assert package_of(module) in TRANSPORTS_MAY_IMPORT, f"{module_of(path)} imports {module}"
        if module.split(".")[0] == "transports":
            assert module.startswith(own) or module == "transports.buffers", f"{own} imports its neighbour {module}"


def impurities(path: Path) -> set[str]:
    """What a file imports or calls that a pure function needs not."""
    modules = imports_of(path, top_level_only=False)
    packages = {package_of(each) if each.split(".")[0] == "kvstore" else each.split(".")[0] for each in modules}
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    return (packages - PURE_MAY_IMPORT) | {each for each in calls if each in ("open", "print") or ".random." in each}


@pytest.mark.parametrize("path", sorted((ROOT / "kvstore" / "schedule").rglob("*.py")), ids=module_of)
def test_plans_and_policies_are_pure(path: Path) -> None:
    assert not impurities(path), "what it needs comes as an argument"


def test_a_wrong_import_is_noticed(tmp_path: Path) -> None:
    """The test above must be able to fail."""
    file = tmp_path / "wrong.py"
    file.write_text("from kvstore.store import Store\nif True:\n    import kvstore.cli.main\n")
    assert {"kvstore.store", "kvstore.cli.main"} <= imports_of(file, top_level_only=True)
    assert RANK["kvstore.store"] > RANK["kvstore.pool"]
    file.write_text(
        "def f():\n    import time\n    from kvstore.pool import Pool\n    np.random.default_rng()\n    open('a')\n"
    )
    assert impurities(file) == {"time", "kvstore.pool", "np.random.default_rng", "open"}


def test_the_map_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    hidden = {"kvstore", "kvstore._version", "kvstore.__main__"}
    assert {package for package in RANK if f"`{package}`" not in page} <= hidden
    named = set(re.findall(r"`(kvstore\.\w+)`", page))
    assert named <= set(RANK) | {"kvstore.open", "kvstore.attach"}


def test_nothing_of_the_library_leaves_checksums_out() -> None:
    """`receive_pieces` can, for the benchmark that measures what they cost."""
    texts = {path: path.read_text() for path in LIBRARY + TRANSPORTS}
    callers = [path for path, text in texts.items() if "receive_pieces" in text]
    assert callers
    assert not [path for path in callers if "is_verified" in texts[path]]
