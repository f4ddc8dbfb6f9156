"""What `import kvstore` costs and pulls in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

IMPORT_S_MAX = 1.0
"""A promise of the library, far above the tens of milliseconds that the import takes."""

IMPORT = """
import json, sys, time
begin = time.perf_counter()
import kvstore
kvstore.open  # names are imported on first use
print(json.dumps([time.perf_counter() - begin, sorted(sys.modules)]))
"""


def import_in_fresh_interpreter() -> tuple[float, set[str]]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    import_s, modules = json.loads(run.stdout)
    return import_s, set(modules)


def test_import_takes_under_a_second() -> None:
    # The quickest of several, so that a busy machine does not decide.
    assert min(import_in_fresh_interpreter()[0] for _ in range(5)) < IMPORT_S_MAX


def test_import_pulls_in_no_framework() -> None:
    _, modules = import_in_fresh_interpreter()
    assert "kvstore" in modules
    assert not {"torch", "transformers", "jax", "vllm", "sglang"} & modules


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
