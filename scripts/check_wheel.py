"""Import test of an installed wheel: run by the Python of a bare environment, outside the source tree.

Usage: python check_wheel.py VERSION
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

IMPORT_S_MAX = 1.0


def check(version: str) -> None:
    """Raises AssertionError, naming what is wrong with the installed package."""
    imported_s = min(_import_s() for _ in range(3))
    assert imported_s < IMPORT_S_MAX, f"import kvstore took {imported_s:.2f} s, more than {IMPORT_S_MAX} s"

    import kvstore
    from kvstore import _native

    heavy = sorted({"torch", "transformers"} & sys.modules.keys())
    assert not heavy, f"import kvstore pulled in {heavy}"
    assert kvstore.__version__ == version, f"imported {kvstore.__version__} instead of {version}"
    assert _native.__version__ == version, f"the native module is {_native.__version__} instead of {version}"
    assert _native.crc32c(b"123456789") == 0xE3069283, "the native checksum is wrong"
    package = importlib.resources.files("kvstore")
    sources = ("bench/sides/raw_sockets.cc", "bench/sides/congestion_shim.c")
    tables = ("profiles/tables/kv_throughput.json", "profiles/paper-1t-h200.json")
    for name in ("py.typed", "_native.pyi", "testing/__init__.py", *sources, *tables):
        assert package.joinpath(name).is_file(), f"kvstore/{name} is not in the wheel"
    assert not package.joinpath("csrc").is_dir(), "the wheel carries the C++ sources"

    from kvstore.profiles import load_profile, published_kv_throughput

    for row in published_kv_throughput():
        assert load_profile(row.profile).name == row.profile, f"the profile {row.profile} is not in the wheel"

    from kvstore.paper.printed import printed_figures
    from kvstore.scenario import Workload, read_scenario, scenario_names
    from kvstore.workload.sources import requests_of

    assert printed_figures(), "the paper's figures are not in the wheel"
    assert scenario_names(), "no scenario is in the wheel"
    for name in scenario_names():
        read_scenario(name)

    for kind in ("mooncake", "agentic"):
        assert next(requests_of(Workload(kind), block_tokens=512, seed=0)), f"the {kind} excerpt is not in the wheel"
        assert package.joinpath(f"workload/data/{kind}/LICENSE-APACHE").is_file(), "an excerpt lacks its licence"

    for group in ("kvstore.transports", "kvstore.codecs"):
        points = importlib.metadata.entry_points(group=group)
        assert points, f"no entry points in {group}"
        for point in points:
            point.load()
    shown = subprocess.run(
        [str(Path(sys.executable).with_name("kvstore")), "--version"], capture_output=True, text=True, timeout=30
    )
    assert shown.returncode == 0, f"kvstore --version failed: {shown.stderr}"
    assert version in shown.stdout, f"kvstore --version printed {shown.stdout!r}"
    print(f"wheel of kvstore {version}: import {imported_s * 1000:.0f} ms, {_native.cpu_features()}")


def _import_s() -> float:
    """Seconds of `import kvstore` in a fresh interpreter, without the interpreter's own start."""
    code = "import time; begin = time.perf_counter(); import kvstore; print(time.perf_counter() - begin)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return float(shown.stdout)


if __name__ == "__main__":
    check(sys.argv[1])
