"""What the transfer tests share: a tiny hybrid model, its random cache, nodes, and children to kill."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvstore
from kvstore.abc import Connection, Listener, Transport, TransportOptions
from kvstore.registry import transport_for
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, Shard, TensorSpec
from kvstore.transfer import Endpoint, TransferObserver, TransferSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.clock import Deadline
    from kvstore.spec import ChunkGrid

ROOT = Path(__file__).parents[2]
WITHIN_S = 30.0
"""No test waits longer for anything, also on a slow and busy machine."""
BLOCK = 4

_names = itertools.count(1)


def tiny_spec(width: int = 8, weights: str = "sha256:tiny", block_tokens: int = BLOCK) -> ModelSpec:
    """Attention, gated-delta states and a sliding window; `width` scales every piece."""
    heads = (Segment("heads", 2, 1),)
    keys = TensorSpec("keys", DType.BFLOAT16, heads, (width,), has_tokens=True)
    values = TensorSpec("values", DType.BFLOAT16, heads, (width,), has_tokens=True)
    conv_segments = (Segment("query", 2, 3), Segment("shared", 1, 2, replicated=True))
    conv = TensorSpec("conv", DType.BFLOAT16, conv_segments, (4,), has_tokens=False)
    recurrent = TensorSpec("recurrent", DType.FLOAT32, heads, (width, 4), has_tokens=False)
    window_keys = TensorSpec("window_keys", DType.FLOAT16, heads, (width,), has_tokens=True)
    return ModelSpec(
        "tiny",
        weights,
        block_tokens,
        (
            CacheGroup("full", ReuseRule.ATTENTION, (1, 3), (keys, values)),
            CacheGroup("delta", ReuseRule.STATE, (0, 2), (conv, recurrent)),
            CacheGroup("window", ReuseRule.STATE, (4,), (window_keys,), window_tokens=6),
        ),
    )


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Ids of a prompt; prompts of one seed are prefixes of each other."""
    ids: list[int] = np.random.default_rng([77, seed]).integers(0, 1 << 32, 4096).tolist()
    return ids[:tokens]


def address(scheme: str) -> str:
    """Where a test may listen."""
    return "tcp://127.0.0.1:0" if scheme == "tcp" else f"memory://transfer-{next(_names)}"


def put_layer(
    writer: kvstore.Writer, layer: int, start: int, stop: int, states: Sequence[int], seed: int, shard: Shard
) -> None:
    """Random cache of one layer: a function of the arguments, so that every node computes the same."""
    spec = writer.transaction.records[0].layout.spec if writer.transaction.records else tiny_spec()
    for group in spec.groups:
        if layer not in group.layers:
            continue
        for tensor in group.tensors:
            rows = [
                row
                for segment, first in zip(tensor.segments, _first_rows(tensor), strict=True)
                for unit in shard.units_of(segment)
                for row in range(first + unit * segment.unit_rows, first + (unit + 1) * segment.unit_rows)
            ]
            if group.rule is ReuseRule.ATTENTION:
                if stop > start:
                    whole = _noise(tensor.shape(tensor.rows, 4096), tensor.dtype, (seed, layer, len(tensor.name)))
                    writer.put(layer, tokens=slice(start, stop), **{tensor.name: whole[rows, start:stop]})
            else:
                for at in states:
                    valid = group.valid_tokens(spec.block_tokens, at)
                    whole = _noise(tensor.shape(tensor.rows, valid), tensor.dtype, (seed, layer, at, len(tensor.name)))
                    tensors: dict[str, Any] = {tensor.name: np.ascontiguousarray(whole[rows])}
                    writer.put_state(layer, at=at, **tensors)


def _first_rows(tensor: TensorSpec) -> list[int]:
    return [0, *np.cumsum([segment.rows for segment in tensor.segments]).tolist()][:-1]


def _noise(shape: tuple[int, ...], dtype: DType, seed: tuple[int, ...]) -> Any:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype.storage).reshape(shape)


def store_prompt(
    store: kvstore.Store,
    ids: list[int],
    *,
    resume_at: Sequence[int] | None = None,
    seed: int = 0,
    salt: bytes = b"",
    grid: ChunkGrid | None = None,
    shard: Shard | None = None,
) -> None:
    """Write and commit a prompt's cache."""
    lengths = tuple(resume_at or (len(ids),))
    with store.write(ids, resume_at=lengths, salt=salt, grid=grid, shard=shard or Shard()) as writer:
        for layer in store.spec.layers:
            put_layer(writer, layer, 0, len(ids), lengths, seed, shard or Shard())
        writer.commit()


def match_all(store: kvstore.Store, ids: list[int], **options: Any) -> kvstore.Match:
    """The match of a whole prompt: one more token is asked for than is stored."""
    return store.match([*ids, 1], **options)


def assert_same(
    source: kvstore.Store,
    target: kvstore.Store,
    ids: list[int],
    tokens: int,
    *,
    with_costs: bool = True,
    **options: Any,
) -> None:
    """Every tensor of a resume point is bit for bit the same on both nodes, and intact."""
    ours, theirs = match_all(source, ids, **options), match_all(target, ids, **options)
    assert ours.tokens == theirs.tokens == tokens
    with source.read(ours) as left, target.read(theirs, verify=True) as right:
        assert right.tokens == tokens
        for layer in source.spec.layers:
            for name in left.layer(layer).names:
                assert left.layer(layer).read(name).tobytes() == right.layer(layer).read(name).tobytes(), (layer, name)
        for here, there in zip(left.records, right.records, strict=True):
            expected = here.header if with_costs else replace(here.header, cost_us=there.header.cost_us)
            assert (there.name, there.header) == (here.name, expected)


def wait_until(condition: Callable[[], bool], what: str, within_s: float = WITHIN_S) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"it took more than {within_s:g} s until {what}"
        time.sleep(0.005)


def assert_settled(*stores: kvstore.Store) -> None:
    """Nothing is reserved or quarantined, and the budget adds up."""
    for store in stores:
        wait_until(
            lambda store=store: store.statistics().reserved_bytes == store.statistics().quarantined_bytes == 0,  # type: ignore[misc]
            "everything reserved was given back",
        )
        store.pool.check()


class Recorder(TransferObserver):
    """Counts bytes, and slows the receiver down if asked to."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.sent: list[tuple[int, int, float, float]] = []
        self.received: list[tuple[int, int, float, float]] = []

    def piece_sent(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self.sent.append((layer, size_bytes, start_s, end_s))

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self.received.append((layer, size_bytes, start_s, end_s))
        if self.pause_s:
            time.sleep(self.pause_s)

    @property
    def sent_bytes(self) -> int:
        return sum(size for _, size, _, _ in self.sent)

    @property
    def received_bytes(self) -> int:
        return sum(size for _, size, _, _ in self.received)


# Faulty networks


class Gate(Recorder):
    """Keeps whoever reports pieces waiting until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        super().piece_received(layer, size_bytes, start_s, end_s)
        assert self.is_open.wait(WITHIN_S)


class WrappedTransport(Transport):
    """Another transport whose outgoing connections pass through `wrap(connection, number)`."""

    def __init__(self, address: str, wrap: Callable[[Connection, int], Connection]) -> None:
        self._inner = transport_for(address)
        self._wrap = wrap
        self._number = itertools.count()

    @property
    def scheme(self) -> str:
        return self._inner.scheme

    def availability(self) -> Any:
        return self._inner.availability()

    def listen(self, address: str, options: TransportOptions) -> Listener:
        return self._inner.listen(address, options)

    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        return self._wrap(self._inner.connect(address, options, deadline), next(self._number))


class WrappedConnection(Connection):
    """Passes everything on."""

    def __init__(self, inner: Connection) -> None:
        self.inner = inner

    @property
    def peer_address(self) -> str:
        return self.inner.peer_address

    @property
    def supports_get(self) -> bool:
        return self.inner.supports_get

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        self.inner.send(buffers, deadline)

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        self.inner.receive(into, deadline)

    def close(self) -> None:
        self.inner.close()

    def expose(self, view: memoryview) -> bytes:
        return self.inner.expose(view)

    def withdraw(self, descriptor: bytes) -> None:
        self.inner.withdraw(descriptor)

    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        self.inner.get(descriptor, offset, into, deadline)


class CutConnection(WrappedConnection):
    """Breaks after it has carried so many bytes outwards."""

    def __init__(self, inner: Connection, cut_after_bytes: int) -> None:
        super().__init__(inner)
        self._left = cut_after_bytes

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        kept = data[: self._left]
        self._left -= len(kept)
        if kept:
            self.inner.send([kept], deadline)
        if len(kept) < len(data):
            self.inner.close()
            self.inner.send([b"x"], deadline)


class DeafConnection(WrappedConnection):
    """Breaks after it has brought so many bytes."""

    def __init__(self, inner: Connection, cut_after_bytes: int) -> None:
        super().__init__(inner)
        self._left = cut_after_bytes

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        wanted = sum(view.nbytes for view in into)
        self._note(wanted)
        self.inner.receive(into, deadline)

    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        self._note(into.nbytes)
        self.inner.get(descriptor, offset, into, deadline)

    def _note(self, size_bytes: int) -> None:
        if size_bytes > self._left:
            self.inner.close()
        self._left -= size_bytes


class FlipConnection(WrappedConnection):
    """Flips one bit of the outgoing stream, once, at a byte offset."""

    def __init__(self, inner: Connection, offset: int) -> None:
        super().__init__(inner)
        self._offset = offset

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        data = bytearray(b"".join(bytes(buffer) for buffer in buffers))
        if 0 <= self._offset < len(data):
            data[self._offset] ^= 0x10
        self._offset -= len(data)
        self.inner.send([bytes(data)], deadline)


# Children


class Child:
    """Another process with a node; told what to do by its arguments, ended by the end of its input."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.transfer_nodes", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        reader = self.process.stdout
        watchdog = threading.Timer(WITHIN_S, self.process.kill)
        watchdog.start()
        self.line = reader.readline().strip()
        watchdog.cancel()
        assert self.line, f"the child ended with {self.process.wait(5)}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WITHIN_S)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def child(*arguments: str) -> Iterator[Child]:
    process = Child(*arguments)
    try:
        yield process
    finally:
        process.close()


BIG_WIDTH = 512
BIG_TOKENS = 256
"""A prompt of the wide tiny model takes about 2 MiB."""


def _receive_in_child() -> None:
    """Listen, say where, and wait."""
    spec = tiny_spec(BIG_WIDTH)
    with kvstore.open(spec, dram="64MiB") as store, Endpoint(store.pool, "tcp://127.0.0.1:0") as endpoint:
        print(endpoint.address, flush=True)
        sys.stdin.read()


def _send_in_child(target: str, pace: str) -> None:
    """Store a prompt, say so, and send it: slowly, or as fast as it goes with a pace of 0."""
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        ids = prompt(BIG_TOKENS)
        store_prompt(store, ids)
        options = TransportOptions(pacing_bytes_per_s=float(pace) or None)
        handle = store.send(match_all(store, ids), target, transport=options)
        print("sending", flush=True)
        handle.result(WITHIN_S)
        sys.stdin.read()


def _serve_in_child() -> None:
    """Store a prompt, answer queries about it, say where, and wait."""
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        store_prompt(store, prompt(BIG_TOKENS))
        options = TransportOptions(pacing_bytes_per_s=1 << 20)
        with Endpoint(store.pool, "tcp://127.0.0.1:0", transport=options, serves=True) as endpoint:
            print(endpoint.address, flush=True)
            sys.stdin.read()


def _fetch_in_child(source: str) -> None:
    """Fetch a prompt from another node, after saying so."""
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        handle = store.fetch([*prompt(BIG_TOKENS), 1], source)
        print("fetching", flush=True)
        handle.result(WITHIN_S)
        sys.stdin.read()


FAST = TransferSettings(progress_deadline_s=2.0, connect_deadline_s=5.0, resume_window_s=1.0, queue_deadline_s=0.2)
"""Short waits where a test waits for them to pass, long enough for a busy machine elsewhere."""

if __name__ == "__main__":
    if sys.argv[1] == "receive":
        _receive_in_child()
    elif sys.argv[1] == "serve":
        _serve_in_child()
    elif sys.argv[1] == "fetch":
        _fetch_in_child(sys.argv[2])
    else:
        _send_in_child(*sys.argv[2:])
