"""Storing and finding records of 1 MiB: in one process, from an attached process, and in other stores.

Ours: `put` and `commit` of a prompt whose blocks are records of 1 MiB, then `match`, `read` and copy into the engine's
tensors; every piece is checksummed when it is put, and with `verified` once more when it is read. Baselines, in turn
with ours: one memcpy of the same bytes, and each peer's batched put and get of as many objects of that size, without
checksums.

    python -m benchmarks.store_vs_peers [--rounds N] [--records N] [--output FILE]

Peers that are installed take part: `pip install redis hiredis mooncake-transfer-engine-non-cuda` and the system's
`redis-server`. One that is not is named below the table.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvstore
from benchmarks.paired import Absent, Row, compare, report
from benchmarks.peers.mooncake_store import MooncakePeer
from benchmarks.peers.peer import PeerMissingError
from benchmarks.peers.redis_server import RedisPeer
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from benchmarks.peers.peer import Peer

BLOCK_TOKENS = 64
HEADS = 8
WIDTH = 256
RECORD_BYTES = 2 * HEADS * BLOCK_TOKENS * WIDTH * 4
CALL_S = 60.0
WARM_PUTS = 8
"""Before a peer is timed: all of its memory has been touched, as ours has since it was opened."""
SPEC = ModelSpec(
    "benchmark",
    "random",
    BLOCK_TOKENS,
    (
        CacheGroup(
            "attention",
            ReuseRule.ATTENTION,
            (0,),
            tuple(TensorSpec(name, DType.FLOAT32, (Segment("heads", HEADS, 1),), (WIDTH,), True) for name in "kv"),
        ),
    ),
)


class Engine:
    """What an engine does with a store: keys and values of one layer, put and taken back."""

    def __init__(self, store: kvstore.Store, records: int) -> None:
        shape = (HEADS, records * BLOCK_TOKENS, WIDTH)
        generator = np.random.default_rng(1)
        self.computed = [generator.random(shape, dtype=np.float32) for _ in "kv"]
        self.restored = [np.ones(shape, np.float32) for _ in "kv"]
        self._store = store
        self._tokens = records * BLOCK_TOKENS
        # Each put is of a prompt that the store has not seen; old ones are evicted as in any full store.
        self._turns = itertools.count()
        self._ids = np.zeros(self._tokens + 1, np.uint32)

    def put(self) -> None:
        self._ids[0] = next(self._turns)
        with self._store.write(self._ids[:-1]) as writer:
            writer.put(0, tokens=slice(0, self._tokens), k=self.computed[0], v=self.computed[1])
            writer.commit()

    def get(self, *, verify: bool = False) -> None:
        match = self._store.match(self._ids)
        assert match.tokens == self._tokens
        with self._store.read(match, verify=verify) as lease:
            lease.layer(0).copy_to(k=self.restored[0], v=self.restored[1])

    def check(self) -> None:
        self.get()
        for computed, restored in zip(self.computed, self.restored, strict=True):
            assert np.array_equal(computed, restored)


def serve_engine(pipe: Connection, socket: str, records: int) -> None:
    """The attached process: does what it is told, until the pipe closes."""
    with kvstore.attach(socket) as store:
        engine = Engine(store, records)
        actions: dict[str, Callable[[], None]] = {
            "put": engine.put,
            "get": engine.get,
            "get verified": lambda: engine.get(verify=True),
            "check": engine.check,
        }
        pipe.send("ready")
        while (word := pipe.recv()) != "end":
            actions[word]()
            pipe.send(word)


class AttachedEngine:
    """An engine in a process of its own, driven by a pipe; a call adds some 50 microseconds."""

    def __init__(self, socket: str, records: int) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=serve_engine, args=(far_end, socket, records), daemon=True)
        self._process.start()
        far_end.close()
        self._expect("ready")

    def do(self, word: str) -> None:
        self._pipe.send(word)
        self._expect(word)

    def _expect(self, word: str) -> None:
        if not self._pipe.poll(CALL_S):
            raise TimeoutError(f"the attached process did not say {word!r} within {CALL_S:g} s")
        assert self._pipe.recv() == word

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join(CALL_S)


def measure(records: int, rounds: int) -> tuple[list[Row], list[Absent]]:
    size_bytes = records * RECORD_BYTES
    rows: list[Row] = []
    absent: list[Absent] = []
    source = np.random.default_rng(2).integers(0, 255, (records, RECORD_BYTES), dtype=np.uint8)
    target = np.ones_like(source)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        socket = f"{directory}/kvstore.sock"
        store = stack.enter_context(kvstore.open(SPEC, dram=size_bytes * 2 + (64 << 20), socket=socket))
        own = Engine(store, records)
        attached = AttachedEngine(socket, records)
        stack.callback(attached.close)
        actions: list[tuple[str, Callable[[], None], bool]] = [
            ("put + commit, in process", own.put, True),
            ("match + read, in process", own.get, False),
            ("match + read verified, in process", lambda: own.get(verify=True), False),
            ("put + commit, attached process", lambda: attached.do("put"), True),
            ("match + read, attached process", lambda: attached.do("get"), False),
            ("match + read verified, attached process", lambda: attached.do("get verified"), False),
        ]

        def compare_all(name: str, put: Callable[[], None], get: Callable[[], None]) -> None:
            for case, ours, is_put in actions:
                if not is_put:
                    own.put() if "in process" in case else attached.do("put")
                theirs = put if is_put else get
                rows.append(compare(case, size_bytes / 1e9, "GB/s", ours, name, theirs, rounds=rounds))

        def memcpy() -> None:
            np.copyto(target, source)

        compare_all("memcpy", memcpy, memcpy)
        own.put()
        own.check()
        attached.do("put")
        attached.do("check")
        makers: list[tuple[str, Callable[[], Peer]]] = [
            ("Redis", RedisPeer),
            ("Mooncake Store", lambda: MooncakePeer(4 * size_bytes)),
        ]
        for title, make in makers:
            try:
                peer = make()
            except PeerMissingError as error:
                absent.append(Absent(title, str(error)))
                continue
            with peer:
                for _ in range(WARM_PUTS):
                    peer.put(source)
                compare_all(peer.name, lambda peer=peer: peer.put(source), lambda peer=peer: peer.get(target))  # type: ignore[misc]
    return rows, absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=int, default=256, help="of 1 MiB each")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/store_vs_peers.json"))
    arguments = parser.parse_args()
    rows, absent = measure(arguments.records, arguments.rounds)
    report("Records of 1 MiB, stored and found", rows, arguments.output, absent)


if __name__ == "__main__":
    main()
