"""Redis without persistence, over its Unix socket, with pipelined commands and with single ones."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.peer import Peer, PeerMissingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

GETS_PER_PIPELINE = 16
"""redis-py holds a whole pipeline's replies in memory; more than this was slower."""
START_S = 10.0


class RedisPeer(Peer):
    """Starts `redis-server` in a directory of its own."""

    def __init__(self) -> None:
        try:
            import redis
        except ImportError as error:
            raise PeerMissingError("the Python client is not installed: pip install redis hiredis") from error
        program = shutil.which("redis-server")
        if program is None:
            raise PeerMissingError("redis-server is not installed: install your system's package of that name")
        self._directory = tempfile.TemporaryDirectory(prefix="redis-")
        path = Path(self._directory.name) / "redis.sock"
        options = [
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(path.parent),
        ]
        self._server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        self._client: Any = redis.Redis(unix_socket_path=str(path))
        end = time.monotonic() + START_S
        while not path.exists() or not self._answers():
            if self._server.poll() is not None or time.monotonic() > end:
                self.close()
                raise PeerMissingError("redis-server did not start")
            time.sleep(0.02)
        self._name = f"Redis {self._client.info('server')['redis_version']}, Unix socket"

    def _answers(self) -> bool:
        try:
            return bool(self._client.ping())
        except OSError:
            return False
        except Exception as error:
            if type(error).__name__ in ("ConnectionError", "BusyLoadingError"):
                return False
            raise

    @property
    def name(self) -> str:
        return f"{self._name}, pipelined"

    @property
    def singly_name(self) -> str:
        return self._name

    def put(self, source: npt.NDArray[np.uint8]) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for number, row in enumerate(source):
                pipeline.set(number, memoryview(row))
            pipeline.execute()

    def get(self, target: npt.NDArray[np.uint8]) -> None:
        for begin in range(0, len(target), GETS_PER_PIPELINE):
            with self._client.pipeline(transaction=False) as pipeline:
                for number in range(begin, min(begin + GETS_PER_PIPELINE, len(target))):
                    pipeline.get(number)
                replies = pipeline.execute()
            assert all(len(reply) == target.shape[1] for reply in replies)

    def put_singly(self, source: npt.NDArray[np.uint8]) -> None:
        for number, row in enumerate(source):
            self._client.set(number, memoryview(row))

    def get_singly(self, target: npt.NDArray[np.uint8]) -> None:
        for number in range(len(target)):
            assert len(self._client.get(number)) == target.shape[1]

    def close(self) -> None:
        self._client.close()
        self._server.kill()
        self._server.wait(START_S)
        self._directory.cleanup()
