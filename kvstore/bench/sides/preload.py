"""Congestion control for sides that cannot be told: `congestion_shim.c`, compiled on use and preloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCE = Path(__file__).parent / "congestion_shim.c"
COMPILERS = ("cc", "gcc", "clang")
COMPILE_S = 60.0
TOOL = "congestion_shim"


def shim_missing() -> str | None:
    """Why there is no shim on this machine; None if it can be made."""
    if _compiler() is None:
        return f"there is no C compiler ({', '.join(COMPILERS)}) in PATH"
    if not SOURCE.exists():
        return f"{SOURCE.name} was not installed with this package"
    return None


def prepare_shim(folder: Path) -> dict[str, str]:
    """Compile it once, into the tools of a side; none where it cannot be made.

    Raises:
        BenchmarkError: the compiler refuses it.
    """
    if shim_missing() is not None:
        return {}
    library = folder / f"{TOOL}.so"
    if not library.exists():
        command = [str(_compiler()), "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        if done.returncode:
            raise BenchmarkError(f"{SOURCE.name} does not compile here: {done.stderr.strip()[-400:]}")
    return {TOOL: str(library)}


def shim_environment(tools: Mapping[str, str], congestion: str) -> dict[str, str]:
    """What a process needs in its environment so that its TCP sockets get an algorithm; empty is the system's."""
    if not congestion or TOOL not in tools:
        return {}
    others = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{tools[TOOL]} {others}".strip(), "KVSTORE_BENCH_CONGESTION": congestion}


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)
