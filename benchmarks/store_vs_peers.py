"""Storing and finding records of 1 MiB: in one process, from an attached process, and in other stores.

Ours: `put` and `commit` of a prompt whose blocks are records of 1 MiB, then `match`, `read` and copy into the engine's
tensors; every piece is checksummed when it is put, and with `verified` once more when it is read. Baselines, in turn
with ours: one memcpy of the same bytes, and each peer's batched put and get of as many objects of that size, without
checksums. Rows `one by one` do the same for prompts of one block, each with calls of its own, against as many memcpys
and each peer's calls for one object.

    python -m benchmarks.store_vs_peers [--rounds N] [--records N] [--singles N] [--output FILE]

Peers that are installed take part: `pip install redis hiredis mooncake-transfer-engine-non-cuda` and the system's
`redis-server`. One that is not is named below the table.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
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


class SingleEngine:
    """An engine whose prompts have one block each: every record has a write, or a match and a read, of its own."""

    def __init__(self, store: kvstore.Store, records: int) -> None:
        shape = (HEADS, BLOCK_TOKENS, WIDTH)
        generator = np.random.default_rng(3)
        self._computed = [[generator.random(shape, dtype=np.float32) for _ in "kv"] for _ in range(records)]
        self._restored = [[np.ones(shape, np.float32) for _ in "kv"] for _ in range(records)]
        self._store = store
        self._turns = itertools.count()
        self._ids = np.zeros(BLOCK_TOKENS + 1, np.uint32)
        self._ids[2] = os.getpid()  # what another process has stored would not be written again

    def put(self) -> None:
        self._ids[0] = next(self._turns)
        for number, (keys, values) in enumerate(self._computed):
            self._ids[1] = number
            with self._store.write(self._ids[:-1]) as writer:
                writer.put(0, tokens=slice(0, BLOCK_TOKENS), k=keys, v=values)
                writer.commit()

    def get(self, *, verify: bool = False) -> None:
        for number, (keys, values) in enumerate(self._restored):
            self._ids[1] = number
            match = self._store.match(self._ids)
            assert match.tokens == BLOCK_TOKENS
            with self._store.read(match, verify=verify) as lease:
                lease.layer(0).copy_to(k=keys, v=values)

    def check(self) -> None:
        self.get()
        assert np.array_equal(self._computed, self._restored)


def serve_engine(pipe: Connection, socket: str, records: int, singles: int) -> None:
    """The attached process: does what it is told, until the pipe closes."""
    with kvstore.attach(socket) as store:
        engine, single = Engine(store, records), SingleEngine(store, singles)
        actions: dict[str, Callable[[], None]] = {
            "put": engine.put,
            "get": engine.get,
            "get verified": lambda: engine.get(verify=True),
            "check": engine.check,
            "put singly": single.put,
            "get singly": single.get,
            "get verified singly": lambda: single.get(verify=True),
            "check singly": single.check,
        }
        pipe.send("ready")
        while (word := pipe.recv()) != "end":
            actions[word]()
            pipe.send(word)


class AttachedEngine:
    """An engine in a process of its own, driven by a pipe; a call adds some 50 microseconds."""

    def __init__(self, socket: str, records: int, singles: int) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=serve_engine, args=(far_end, socket, records, singles), daemon=True)
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


def measure(records: int, singles: int, rounds: int) -> tuple[list[Row], list[Absent]]:
    size_bytes, singles_bytes = records * RECORD_BYTES, singles * RECORD_BYTES
    rows: list[Row] = []
    absent: list[Absent] = []
    source = np.random.default_rng(2).integers(0, 255, (records, RECORD_BYTES), dtype=np.uint8)
    target = np.ones_like(source)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        socket = f"{directory}/kvstore.sock"
        dram = max(size_bytes, singles_bytes) * 2 + (64 << 20)
        store = stack.enter_context(kvstore.open(SPEC, dram=dram, socket=socket))
        own, single = Engine(store, records), SingleEngine(store, singles)
        attached = AttachedEngine(socket, records, singles)
        stack.callback(attached.close)
        actions: list[tuple[str, Callable[[], None], bool]] = [
            ("put + commit, in process", own.put, True),
            ("match + read, in process", own.get, False),
            ("match + read verified, in process", lambda: own.get(verify=True), False),
            ("put + commit, attached process", lambda: attached.do("put"), True),
            ("match + read, attached process", lambda: attached.do("get"), False),
            ("match + read verified, attached process", lambda: attached.do("get verified"), False),
        ]

        single_actions: list[tuple[str, Callable[[], None], bool]] = [
            ("put + commit one by one, in process", single.put, True),
            ("match + read one by one, in process", single.get, False),
            ("match + read one by one verified, in process", lambda: single.get(verify=True), False),
            ("put + commit one by one, attached process", lambda: attached.do("put singly"), True),
            ("match + read one by one, attached process", lambda: attached.do("get singly"), False),
            ("match + read one by one verified, attached process", lambda: attached.do("get verified singly"), False),
        ]

        def compare_all(name: str, put: Callable[[], None], get: Callable[[], None]) -> None:
            for case, ours, is_put in actions:
                if not is_put:
                    own.put() if "in process" in case else attached.do("put")
                theirs = put if is_put else get
                rows.append(compare(case, size_bytes / 1e9, "GB/s", ours, name, theirs, rounds=rounds))

        def compare_singly(name: str, put: Callable[[], None], get: Callable[[], None]) -> None:
            for case, ours, is_put in single_actions:
                if not is_put:
                    single.put() if "in process" in case else attached.do("put singly")
                theirs = put if is_put else get
                rows.append(compare(case, singles_bytes / 1e9, "GB/s", ours, name, theirs, rounds=rounds))

        few_source, few_target = source[:singles], target[:singles]

        def memcpy() -> None:
            np.copyto(target, source)

        def memcpy_singly() -> None:
            for to, of in zip(few_target, few_source, strict=True):
                np.copyto(to, of)

        compare_all("memcpy", memcpy, memcpy)
        compare_singly("memcpy", memcpy_singly, memcpy_singly)
        for engine in (own, single):
            engine.put()
            engine.check()
        for words in ("put", "check", "put singly", "check singly"):
            attached.do(words)
        makers: list[tuple[str, Callable[[], Peer]]] = [
            ("Redis", RedisPeer),
            # What was read lately cannot be removed there, so there is room for all rounds of the small puts.
            ("Mooncake Store", lambda: MooncakePeer(4 * size_bytes + (2 * rounds + 4) * singles_bytes)),
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
                compare_singly(
                    peer.singly_name,
                    lambda peer=peer: peer.put_singly(few_source),  # type: ignore[misc]
                    lambda peer=peer: peer.get_singly(few_target),  # type: ignore[misc]
                )
    return rows, absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=int, default=256, help="of 1 MiB each")
    parser.add_argument("--singles", type=int, default=64, help="prompts of one such record, at most --records")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/store_vs_peers.json"))
    arguments = parser.parse_args()
    if arguments.singles > arguments.records:
        parser.error(f"--singles {arguments.singles} is more than --records {arguments.records}")
    rows, absent = measure(arguments.records, arguments.singles, arguments.rounds)
    report("Records of 1 MiB, stored and found", rows, arguments.output, absent)


if __name__ == "__main__":
    main()
