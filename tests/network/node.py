"""A node in a process of its own, told what to do line by line: `python -m tests.network.node ARGUMENTS`.

Arguments and lines are JSON; each line is answered by one. It ends when its input does. Prompts are known by a seed and
a length, and their cache is a function of both (`transfer_nodes`), so that every node can say what it must be.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvstore
import kvstore.transfer.attachment
import kvstore.transfer.path_watch
from kvstore.abc import TransportOptions
from kvstore.errors import KVStoreError, PeerGoneError
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from tests.integration.transfer_nodes import Recorder, match_all, prompt, store_prompt, tiny_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.handle import Handle
    from kvstore.transfer import TransferReport

FOR_EVER_S = 3600.0


@dataclass
class Sending:
    """One transfer and the thread that notes when and how it ends."""

    handle: Handle[TransferReport]
    thread: threading.Thread
    outcome: dict[str, Any]


class Node:
    """What the commands act on. One thread.

    Args:
        width, block_tokens: of the tiny model.
        dram: bytes of the store.
        settings: of transfers, both ways.
        congestion_control: of all connections.
        local_addresses: that the connections of its transfers leave from, in turn.
        pause_s: after each frame that arrives, which makes a slow reader.
        frame_bytes: of pieces in one frame, so that little data is many frames and enough for several connections.
    """

    def __init__(
        self,
        *,
        width: int = 8,
        block_tokens: int = 4,
        dram: str = "64MiB",
        settings: dict[str, Any] | None = None,
        congestion_control: str | None = None,
        local_addresses: Sequence[str] = (),
        pause_s: float = 0.0,
        frame_bytes: int | None = None,
    ) -> None:
        if frame_bytes is not None:
            kvstore.transfer.attachment.FRAME_BYTES = frame_bytes
            kvstore.transfer.path_watch.JOIN_BYTES_MIN = 1
        self._store = kvstore.open(tiny_spec(width, block_tokens=block_tokens), dram=dram)
        self._settings = TransferSettings(**(settings or {}))
        self._options = TransportOptions(congestion_control=congestion_control)
        self._routed = replace(self._options, local_addresses=tuple(local_addresses))
        self._observer = Recorder(pause_s)
        self._sender = Sender(settings=self._settings)
        self._endpoint: Endpoint | None = None
        self._sendings: dict[str, Sending] = {}

    def listen(self, address: str) -> dict[str, Any]:
        """Receive at an address."""
        self._endpoint = Endpoint(
            self._store.pool, address, transport=self._options, settings=self._settings, observer=self._observer
        )
        return {"address": self._endpoint.address}

    def put(self, seed: int, tokens: int) -> dict[str, Any]:
        """Write and commit a prompt; its piece bytes."""
        store_prompt(self._store, prompt(tokens, seed), seed=seed)
        with self._store.read(match_all(self._store, prompt(tokens, seed))) as lease:
            return {"bytes": sum(int(record.layout.piece_sizes.sum()) for record in lease.records)}

    def send(
        self, name: str, to: str, seed: int, tokens: int, resume: list[int] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Begin a transfer, or take up one that has failed."""
        lease = self._store.read(match_all(self._store, prompt(tokens, seed)))
        handle = send_lease(
            lease,
            to,
            sender=self._sender,
            transport=self._routed,
            observer=self._observer,
            resume=None if resume is None else (resume[0], resume[1]),
            **options,
        )
        outcome: dict[str, Any] = {}
        thread = threading.Thread(target=_follow, args=(handle, outcome), name=f"follow-{name}", daemon=True)
        self._sendings[name] = Sending(handle, thread, outcome)
        thread.start()
        return {}

    def wait(self, name: str, within_s: float) -> dict[str, Any]:
        """How a transfer ended, and when by the machine's monotonic clock; `running` if it has not."""
        sending = self._sendings[name]
        sending.thread.join(within_s)
        if sending.thread.is_alive():
            return {"running": True}
        del self._sendings[name]
        return sending.outcome

    def cancel(self, name: str) -> dict[str, Any]:
        """Give a transfer up."""
        self._sendings[name].handle.cancel("the test says so")
        return {}

    def digest(self, seed: int, tokens: int) -> dict[str, Any]:
        """How much of a prompt is visible, and the SHA-256 of all its tensors, read with verification."""
        match = match_all(self._store, prompt(tokens, seed))
        if not match:
            return {"tokens": 0, "digest": ""}
        found = hashlib.sha256()
        with self._store.read(match, verify=True) as lease:
            for layer in self._store.spec.layers:
                for tensor in sorted(lease.layer(layer).names):
                    found.update(lease.layer(layer).read(tensor).tobytes())
            return {"tokens": lease.tokens, "digest": found.hexdigest()}

    def evict(self, seed: int, tokens: int) -> dict[str, Any]:
        """Drop a prompt; the bytes that this freed."""
        return {"bytes": self._store.pool.evict(self._store.prompt(prompt(tokens, seed)).path.keys[0])}

    def state(self) -> dict[str, Any]:
        """Budgets and everything that must go back to where it was."""
        gc.collect()
        self._store.pool.check()
        statistics = self._store.statistics()
        endpoint = self._endpoint
        return {
            "committed_bytes": statistics.committed_bytes,
            "reserved_bytes": statistics.reserved_bytes,
            "quarantined_bytes": statistics.quarantined_bytes,
            "damaged_records": statistics.damaged_records,
            "transfers": endpoint.transfer_count if endpoint is not None else 0,
            "connections": endpoint.connection_count if endpoint is not None else 0,
            "received": asdict(endpoint.statistics()) if endpoint is not None else {},
            "sending": len(self._sender._transfers),
            "threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "resident_bytes": _resident_bytes(),
            "sent_bytes": self._observer.sent_bytes,
            "received_bytes": self._observer.received_bytes,
        }

    def close(self) -> None:
        """End everything."""
        if self._endpoint is not None:
            self._endpoint.close()
        self._sender.close()
        self._store.close()


def _follow(handle: Handle[TransferReport], outcome: dict[str, Any]) -> None:
    try:
        report = handle.result(FOR_EVER_S)
    except KVStoreError as error:
        transfer = error.transfer if isinstance(error, PeerGoneError) else None
        outcome.update(failed=type(error).__name__, message=str(error), transfer=transfer)
    else:
        outcome.update(
            failed=None, total_bytes=report.total_bytes, pieces=report.pieces, seconds=report.seconds,
            reconnects=report.reconnects, skipped=report.pieces_skipped, connections=report.path.connections,
        )  # fmt: skip
    outcome["ended_s"] = time.monotonic()


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmRSS")


def main() -> None:
    node = Node(**json.loads(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        words = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(node, words.pop("do"))
        try:
            answer = command(**words)
        except KVStoreError as error:
            answer = {"refused": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)
    node.close()


if __name__ == "__main__":
    main()
