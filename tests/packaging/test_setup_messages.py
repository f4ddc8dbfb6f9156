"""What a person without a compiler or with an old Python is told: one sentence each, with the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ROOT / "scripts" / name), *arguments],
        env=dict(os.environ, **environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_one_sentence(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1, run.stderr
    for part in parts:
        assert part in run.stderr


def test_missing_compiler() -> None:
    run = run_script("check_compiler.sh", CXX="/nonexistent/compiler")
    assert_one_sentence(run, "needs a C++20 compiler", "found none at CXX=/nonexistent/compiler", "set CXX")


def test_old_compiler(tmp_path: Path) -> None:
    old = tmp_path / "c++"
    old.write_text("#!/bin/sh\necho 'unknown option -std=c++20' >&2\nexit 1\n")
    old.chmod(0o755)
    assert_one_sentence(run_script("check_compiler.sh", CXX=str(old)), f"{old} cannot compile C++20")


def test_missing_python() -> None:
    run = run_script("find_python.sh", "/nonexistent/python3")
    assert_one_sentence(run, "needs Python 3.11 or later", "/nonexistent/python3 was not found", "make PYTHON=")


def test_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    # The same interpreter, believing that it is an older one.
    old.write_text(f"#!/bin/sh\n(echo 'import sys; sys.version_info = (3, 9, 1)'; cat) | exec {sys.executable} -\n")
    old.chmod(0o755)
    assert_one_sentence(run_script("find_python.sh", str(old)), f"{old} is Python 3.9")


def test_cmake_without_compiler(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("cmake is not installed; only a build needs it")
    run = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(tmp_path)],
        env=dict(os.environ, CXX="/nonexistent/compiler"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    message = " ".join(run.stderr.split())
    assert "kvstore needs a C++20 compiler (g++ 11 or clang 14, or later) and found none" in message
    assert message.count("CMake Error") == 1
