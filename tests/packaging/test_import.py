"""What `import kvstore` costs and pulls in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

IMPORT_S_MAX = 1.0
"""A promise of the library, far above the tens of milliseconds that the import takes."""

IMPORT = """
import json, sys, time
begin = time.process_time()
import kvstore
kvstore.open  # names are imported on first use
print(json.dumps([time.process_time() - begin, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled modules, as an installation has them: the promise is not about compiling."""
    return tmp_path_factory.mktemp("bytecode")


def import_in_fresh_interpreter(bytecode: Path) -> tuple[float, set[str]]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), PYTHONPYCACHEPREFIX=str(bytecode))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    import_s, modules = json.loads(run.stdout)
    return import_s, set(modules)


def test_import_takes_under_a_second(bytecode: Path) -> None:
    # Of a processor, and the quickest of several, so that what else the machine does is not counted.
    assert min(import_in_fresh_interpreter(bytecode)[0] for _ in range(5)) < IMPORT_S_MAX


def test_import_pulls_in_no_framework(bytecode: Path) -> None:
    _, modules = import_in_fresh_interpreter(bytecode)
    assert "kvstore" in modules
    assert not {"torch", "transformers", "jax", "vllm", "sglang"} & modules


def test_import_pulls_in_no_further_tier(bytecode: Path) -> None:
    _, modules = import_in_fresh_interpreter(bytecode)
    further = ("kvstore.tiers.ssd", "kvstore.placement", "triton")
    assert [name for name in modules if name.startswith(further)] == []


def test_version_has_one_source() -> None:
    import kvstore
    from kvstore import _native, _version

    assert kvstore.__version__ == _version.__version__ == _native.__version__


def test_every_public_name_is_there() -> None:
    import kvstore

    for name in kvstore.__all__:
        assert getattr(kvstore, name) is not None
    assert set(kvstore._HOMES) | {"__version__"} == set(kvstore.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvstore.no_such_name
