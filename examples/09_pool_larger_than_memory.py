"""A pool that is larger than memory, and there again after the process has ended: one tier in memory, one on disk.

Needs neither torch nor a GPU. Writes about 20 MB into a temporary directory.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np

import kvstore
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

LAYERS, HEADS, DIM, BLOCK = 4, 2, 64, 64
TOKENS, PROMPTS = 512, 16

heads = (Segment("heads", HEADS, 1),)
tensors = tuple(TensorSpec(name, DType.FLOAT16, heads, (DIM,), True) for name in ("keys", "values"))
group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(LAYERS)), tensors)
spec = ModelSpec("example", "weights of seed 0", BLOCK, (group,))


def prompt(number: int) -> list[int]:
    """Token ids of one prompt."""
    return [1000 * number + position for position in range(TOKENS)]


def values(number: int, layer: int, name: str) -> np.ndarray:
    """What a model would have computed: `[heads, tokens, dim]`."""
    seed = np.random.default_rng([number, layer, len(name)])
    return seed.standard_normal((HEADS, TOKENS, DIM)).astype(np.float16)


def write(store: kvstore.Store) -> None:
    """Write every prompt; memory holds a quarter of them."""
    for number in range(PROMPTS):
        with store.write(prompt(number)) as writer:
            for layer in range(LAYERS):
                writer.put(
                    layer,
                    tokens=slice(0, TOKENS),
                    keys=values(number, layer, "keys"),
                    values=values(number, layer, "values"),
                )
            writer.commit()
        store.flush(deadline_s=60)  # durable from here on; a server would do this now and then, or never


def read(store: kvstore.Store) -> None:
    """Read every prompt, layer by layer while later layers are still being loaded."""
    tiers: dict[str, int] = {}
    for number in range(PROMPTS):
        match = store.match([*prompt(number), 0])
        assert match.tokens == TOKENS, match.missing.reasons
        tiers[str(match.tier)] = tiers.get(str(match.tier), 0) + 1
        with store.read(match, layered=True, deadline_s=60) as lease:
            for layer in lease:
                for name in ("keys", "values"):
                    assert np.array_equal(layer.read(name), values(number, layer.number, name))
    print(f"  read {PROMPTS} prompts, found in: {tiers}")


def main() -> None:
    """Write more than memory holds, then open the directory again."""
    with tempfile.TemporaryDirectory() as directory:
        ssd = f"{directory}/kv:1GiB"
        with kvstore.open(spec, dram="5MiB", ssd=ssd) as store:
            write(store)
            evicted = store.statistics().evicted_records
            print(f"wrote {PROMPTS} prompts; {evicted} records did not stay in memory")
            read(store)
        began_s = time.perf_counter()
        with kvstore.open(spec, dram="5MiB", ssd=ssd) as store:
            print(f"opened again in {time.perf_counter() - began_s:.3f} s")
            read(store)


if __name__ == "__main__":
    main()
