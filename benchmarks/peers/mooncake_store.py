"""Mooncake Store over TCP: a master, a process that lends memory, and this process as the client."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.peer import Peer, PeerMissingError, free_port

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LOCAL_BUFFER_BYTES = 256 << 20
PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")

STORAGE_PROGRAM = """
import os, sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[1]), 1 << 24, "tcp", "", sys.argv[2])
print(code, flush=True)
sys.stdin.read()
os._exit(0)
"""


class MooncakePeer(Peer):
    """Registers the caller's arrays once, as its users do; objects are written in batches, or one by one."""

    def __init__(self, segment_bytes: int) -> None:
        # Read when the library is loaded. More than the default number of transfers is queued by one batch.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "8192")
        self._processes: list[subprocess.Popen[str]] = []
        self._store: Any = None
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise PeerMissingError(f"pip install {PACKAGES[0]} ({error})") from error
        address = f"127.0.0.1:{free_port()}"
        self._start_master(address.rpartition(":")[2])
        self._start_storage(segment_bytes, address)
        self._store = MooncakeDistributedStore()
        code = self._store.setup("127.0.0.1", "P2PHANDSHAKE", 0, LOCAL_BUFFER_BYTES, "tcp", "", address)
        if code:
            self.close()
            raise PeerMissingError(f"Mooncake Store's client did not start, code {code}")
        self._registered: set[int] = set()
        self._names: list[str] = []
        self._rounds = itertools.count()
        self._version = next(_versions())

    def _start_master(self, port: str) -> None:
        specification = importlib.util.find_spec("mooncake.store")
        assert specification is not None
        assert specification.origin is not None
        program = Path(specification.origin).parent / "mooncake_master"
        program.chmod(0o755)
        options = [f"--rpc_port={port}", "--enable_http_metadata_server=false", f"--metrics_port={free_port()}"]
        quiet = subprocess.DEVNULL
        self._processes.append(subprocess.Popen([str(program), *options], stdout=quiet, stderr=quiet, text=True))

    def _start_storage(self, segment_bytes: int, address: str) -> None:
        for _ in range(20):  # the master takes a moment to listen
            command = [sys.executable, "-c", STORAGE_PROGRAM, str(segment_bytes), address]
            pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
            self._processes.append(process)
            assert process.stdout is not None
            if process.stdout.readline().strip() == "0":
                return
            process.kill()
        self.close()
        raise PeerMissingError("Mooncake's master or storage process did not start")

    @property
    def name(self) -> str:
        return f"{self.singly_name}, batches"

    @property
    def singly_name(self) -> str:
        return f"Mooncake Store {self._version}, TCP"

    def put(self, source: npt.NDArray[np.uint8]) -> None:
        self._rename(len(source))
        codes = self._store.batch_put_from(self._names, self._addresses(source), [source.shape[1]] * len(source))
        assert not any(codes), codes

    def get(self, target: npt.NDArray[np.uint8]) -> None:
        sizes = self._store.batch_get_into(self._names, self._addresses(target), [target.shape[1]] * len(target))
        assert all(size == target.shape[1] for size in sizes), sizes

    def put_singly(self, source: npt.NDArray[np.uint8]) -> None:
        self._rename(len(source))
        for name, address in zip(self._names, self._addresses(source), strict=True):
            code = self._store.put_from(name, address, source.shape[1])
            assert code == 0, code

    def get_singly(self, target: npt.NDArray[np.uint8]) -> None:
        for name, address in zip(self._names, self._addresses(target), strict=True):
            size = self._store.get_into(name, address, target.shape[1])
            assert size == target.shape[1], size

    def _rename(self, count: int) -> None:
        """New names for each put: an object is never replaced there.

        Removing the last round's takes 256 short requests, a few percent of a put, and keeps the memory warm: into
        fresh pages it puts a third as fast. What was read within the last seconds cannot be removed and stays.
        """
        for name in self._names:
            self._store.remove(name)
        turn = next(self._rounds)
        self._names = [f"{turn}/{number}" for number in range(count)]

    def _addresses(self, array: npt.NDArray[np.uint8]) -> list[int]:
        begin = array.ctypes.data
        if begin not in self._registered:
            assert self._store.register_buffer(begin, array.nbytes) == 0
            self._registered.add(begin)
        return [begin + number * array.shape[1] for number in range(len(array))]

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
        for process in self._processes:
            process.kill()
            process.wait(10)


def _versions() -> Any:
    for package in PACKAGES:
        try:
            yield importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
