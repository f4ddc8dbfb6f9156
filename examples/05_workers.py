"""One pool, several processes: `python examples/05_workers.py`.

The owner opens the pool; two workers attach, each writes its own half of every layer straight into the owner's memory,
and the halves become visible in one step. What must not fail silently is shown too: a worker that never comes.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from typing import TYPE_CHECKING

import numpy as np

import kvstore
from kvstore.errors import JointCommitError
from kvstore.spec import CacheGroup, DType, ReuseRule, Segment, Shard, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORKERS = 2
LAYERS, HEADS, DIM, BLOCK_TOKENS, TOKENS = 4, 4, 32, 16, 256
DEADLINE_S = 60.0
IDS = list(range(TOKENS))


def build_spec() -> kvstore.ModelSpec:
    tensors = tuple(
        TensorSpec(name, DType.FLOAT32, (Segment("heads", HEADS, 1),), (DIM,), has_tokens=True)
        for name in ("keys", "values")
    )
    group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(LAYERS)), tensors)
    return kvstore.ModelSpec("example", "seed 0", BLOCK_TOKENS, (group,))


def layer_cache(layer: int, rank: int) -> NDArray[np.float32]:
    """What a worker computed: its share of the heads, `[heads, tokens, dim]`."""
    generator = np.random.default_rng([layer, rank])
    return generator.standard_normal((HEADS // WORKERS, TOKENS, DIM), np.float32)


def work(socket: str, rank: int) -> None:
    shard = Shard(rank, WORKERS)
    with (
        kvstore.attach(socket, spec=build_spec(), deadline_s=DEADLINE_S) as store,
        store.write(IDS, shard=shard, joint="request-17") as writer,
    ):
        for layer in range(LAYERS):
            cache = layer_cache(layer, rank)
            writer.put(layer, tokens=slice(0, TOKENS), keys=cache, values=-cache)
        writer.commit(deadline_s=DEADLINE_S)  # returns when both halves are visible


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="kvs-") as folder,
        kvstore.open(build_spec(), dram="16MiB", socket=f"{folder}/pool.sock") as store,
    ):
        workers = [spawn.Process(target=work, args=(f"{folder}/pool.sock", rank)) for rank in range(WORKERS)]
        for worker in workers:
            worker.start()
        match = store.when_ready([*IDS, 0], TOKENS).result(DEADLINE_S)
        for worker in workers:
            worker.join(DEADLINE_S)
        print(f"{WORKERS} workers wrote {match.tokens} tokens, {store.statistics().committed_bytes} bytes")
        with store.read(match, verify=True) as lease:
            for layer in range(LAYERS):
                expected = np.concatenate([layer_cache(layer, rank) for rank in range(WORKERS)])
                assert np.array_equal(lease.layer(layer).read("keys"), expected)
                assert np.array_equal(lease.layer(layer).read("values"), -expected)
        print("the owner reads both halves, bit for bit")

        other = [1, *IDS[1:]]
        with store.write(other, shard=Shard(0, WORKERS), joint="request-18") as writer:
            for layer in range(LAYERS):
                cache = layer_cache(layer, 0)
                writer.put(layer, tokens=slice(0, TOKENS), keys=cache, values=-cache)
            try:
                writer.commit(deadline_s=0.1)
            except JointCommitError as error:
                print(f"half a prompt stays invisible: {error}")
        assert not store.match([*other, 0])


if __name__ == "__main__":
    main()
