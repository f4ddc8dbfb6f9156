"""Runs a file of tests against the kvstore that is installed: `run_tests.py TESTS RESULTS.xml`.

pyproject.toml would put the tree first, whose native module is not where it looks, and conftest.py asks for more than
is installed here.
"""

import os
import sys

import pytest

tests, results = sys.argv[1:]
lost = ("PytestUnhandledThreadExceptionWarning", "PytestUnraisableExceptionWarning")
options = ["-q", "-rs", "--import-mode=importlib", "--noconftest", "-p", "no:cacheprovider", "--timeout=120"]
options += [word for name in lost for word in ("-W", f"error::pytest.{name}")]
options += ["-c", os.devnull, "--rootdir", os.path.dirname(tests), f"--junit-xml={results}"]
sys.exit(pytest.main([*options, tests]))
