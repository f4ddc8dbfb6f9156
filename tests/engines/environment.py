"""A virtual environment for each engine under build/engines, with the versions that the tests are held to."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "engines"
INSTALL_LIMIT_S = 1500.0
INSTALL_ATTEMPTS = 3
PAUSE_S = 5.0
HOPELESS = ("No matching distribution", "No space left", "Permission denied", "Invalid requirement")
"""What pip says where another attempt would end the same way; else a registry may be slow, or cut a connection."""
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


class NotRunError(Exception):
    """An engine, or a script in its environment, cannot run here; the text says why."""


@dataclass(frozen=True)
class Environment:
    """An engine's Python, with kvstore installed in it as a user would.

    Attributes:
        is_tree: kvstore comes from this tree and not from a wheel (an environment that somebody else made).
    """

    engine: str
    python: Path
    is_tree: bool

    def run(
        self,
        script: Path,
        arguments: Sequence[str],
        *,
        log: Path,
        limit_s: float,
        variables: Mapping[str, str] | None = None,
    ) -> float:
        """Run a script of the tests to its end; what it prints goes to `log`. Seconds it took.

        Raises:
            NotRunError: it ended with another status than 0, or ran past the limit; with the log's last lines.
        """
        begin = time.monotonic()
        process = self.start(script, arguments, log=log, variables=variables)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise NotRunError(f"{script.name} ran longer than {limit_s:.0f} s\n{tail(log)}") from None
        finally:
            end(process)
        if status:
            raise NotRunError(f"{script.name} ended with status {status}\n{tail(log)}")
        return time.monotonic() - begin

    def start(
        self,
        script: Path,
        arguments: Sequence[str],
        *,
        log: Path,
        variables: Mapping[str, str] | None = None,
        is_talking: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a script in a process group of its own; `end` ends it with all it started.

        Args:
            is_talking: its standard input and output are pipes, and only its standard error goes to `log`.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self.is_tree:
            environment["PYTHONPATH"] = str(ROOT)
        with log.open("wb") as output:
            return subprocess.Popen(
                [str(self.python), str(script), *arguments],
                stdout=subprocess.PIPE if is_talking else output,
                stderr=output,
                stdin=subprocess.PIPE if is_talking else subprocess.DEVNULL,
                env=environment | dict(variables or {}),
                cwd=log.parent,
                start_new_session=True,
            )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, and remove the engine's shared memory, which a killed one leaves."""
    shared = _shared_memory(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    for path in shared:
        path.unlink(missing_ok=True)


def _shared_memory(group: int) -> set[Path]:
    """Files of /dev/shm that processes of a group have mapped. What kvstore leaves would be for a test to notice."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(folder.name)) == group:
                names = (line.split(maxsplit=5)[5:] for line in (folder / "maps").read_text().splitlines())
                found |= {Path(name[0]) for name in names if name and name[0].startswith("/dev/shm/")}
    return {path for path in found if "kvstore" not in path.name and path.exists()}


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def prepare(engine: str, *, disk_bytes: int = 0, insists: bool = False) -> Environment:
    """The engine's environment, installed where it is not there yet.

    `KVSTORE_ENGINE_<NAME>=/path/to/python` takes one that exists, with kvstore from this tree.

    Args:
        disk_bytes: what the installation takes, downloads included.
        insists: let the installer's own error out.

    Raises:
        NotRunError: the engine cannot be installed here.
        subprocess.CalledProcessError: kvstore cannot.
    """
    if given := os.environ.get(f"KVSTORE_ENGINE_{engine.upper()}"):
        return Environment(engine, Path(given), is_tree=True)
    place = BUILD / engine
    requirements = Path(__file__).parent / engine / "requirements.txt"
    python = place / "bin" / "python"
    stamp = place / ".installed"
    digest = _digest(requirements.read_bytes(), sys.version.encode(), str(place).encode())
    try:
        if not stamp.exists() or stamp.read_text() != digest:
            print(f"engines: installing {engine} into {place.relative_to(ROOT)} (minutes, gigabytes)", flush=True)
            shutil.rmtree(place, ignore_errors=True)
            _check_disk(disk_bytes)
            _call(sys.executable, "-m", "venv", str(place))
            _install(python, requirements)
            _call(str(python), "-c", "import torch")  # not so where pip has got a build for another kind of machine
            stamp.write_text(digest)
    except (OSError, subprocess.SubprocessError) as error:
        if insists:
            raise
        raise NotRunError(f"{engine} cannot be installed: {_reason(error)}") from error
    _install_kvstore(place, python)
    return Environment(engine, python, is_tree=False)


def _check_disk(needed_bytes: int) -> None:
    """Refuse before anything is downloaded.

    Raises:
        OSError: there is not as much left where environments are made.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(BUILD).free
    if free_bytes < needed_bytes:
        raise OSError(f"it needs {needed_bytes / 1e9:.1f} GB of disk, and {free_bytes / 1e9:.1f} GB are free")


def _install(python: Path, requirements: Path) -> None:
    """Install what the file lists, which is everything: nothing is resolved, and nothing comes that is not needed."""
    until = time.monotonic() + INSTALL_LIMIT_S
    for attempt in range(1, INSTALL_ATTEMPTS + 1):
        try:
            _call(
                str(python), *PIP, "install", "--no-deps", "--requirement", str(requirements),
                limit_s=max(1.0, until - time.monotonic()),
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            if attempt == INSTALL_ATTEMPTS or any(text in str(error.output) for text in HOPELESS):
                raise
            print(f"engines: attempt {attempt} of {INSTALL_ATTEMPTS} failed: {_reason(error)}", flush=True)
            time.sleep(PAUSE_S)
        else:
            return


def _install_kvstore(place: Path, python: Path) -> None:
    """Build a wheel of this tree, as `make wheel` does but with the objects that `make build` made, and install it."""
    wheels = BUILD / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    # The tools to build it are in the environment that this runs in.
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    options = ("--no-deps", "--no-build-isolation", "--config-settings=build-dir=build/native")
    _call(sys.executable, *PIP, "wheel", *options, "--wheel-dir", str(wheels), str(ROOT), variables=tools)
    (wheel,) = wheels.glob("kvstore-*.whl")
    stamp = place / ".kvstore"
    digest = _digest(wheel.read_bytes())
    if not stamp.exists() or stamp.read_text() != digest:
        _call(str(python), *PIP, "install", "--force-reinstall", "--no-deps", str(wheel))
        stamp.write_text(digest)


def _call(*command: str, variables: Mapping[str, str] | None = None, limit_s: float = INSTALL_LIMIT_S) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            timeout=limit_s,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        error.add_note(error.output)
        raise


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{' '.join(map(str, error.cmd[1:4]))} took longer than {error.timeout:.0f} s"
    output = getattr(error, "output", None)
    lines = [line for line in str(output or error).splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1] if lines else type(error).__name__
