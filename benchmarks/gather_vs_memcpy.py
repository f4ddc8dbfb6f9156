"""How close to one memcpy is moving a model's KV into records and back?

Three rows per piece size, each against one memcpy of the same bytes: gather alone, scatter alone, and a
whole write with checksums, framing and commit. The working set is larger than the last-level cache.

    python -m benchmarks.gather_vs_memcpy [--rounds N] [--mebibytes N] [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import kvstore
from benchmarks.paired import Row, compare, report
from kvstore.record.array_view import view_array
from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.store.fill import gather_tokens, spans_of

HEADS = 8
CHUNK_TOKENS = 2048


def spec_of(piece_bytes: int, layers: int) -> ModelSpec:
    """Dense attention whose pieces (one head of one block) have a size."""
    block_tokens = 64 if piece_bytes <= 256 << 10 else 256
    segments = (Segment("heads", HEADS, 1),)
    inner = (piece_bytes // block_tokens // 4,)
    tensors = tuple(TensorSpec(name, DType.FLOAT32, segments, inner, True) for name in ("keys", "values"))
    group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(layers)), tensors)
    return ModelSpec("benchmark", "random", block_tokens, (group,))


def measure(piece_bytes: int, total_bytes: int, rounds: int) -> list[Row]:
    probe = spec_of(piece_bytes, 1)
    token_bytes = 2 * HEADS * piece_bytes // probe.block_tokens
    chunk_tokens = min(CHUNK_TOKENS, max(probe.block_tokens, (64 << 20) // token_bytes))
    layers = max(1, total_bytes // (token_bytes * chunk_tokens))
    spec = spec_of(piece_bytes, layers)
    size_bytes = token_bytes * chunk_tokens * layers
    generator = np.random.default_rng(1)
    shape = (HEADS, chunk_tokens, token_bytes // (2 * HEADS * 4))
    keys, values = ([generator.random(shape, dtype=np.float32) for _ in range(layers)] for _ in range(2))
    token_ids = np.arange(chunk_tokens)
    source = np.ones(size_bytes, np.uint8)
    target = np.ones(size_bytes, np.uint8)

    def memcpy() -> None:
        np.copyto(target, source)

    case = f"{piece_bytes >> 10} KiB pieces"
    rows = []
    with kvstore.open(spec, dram=size_bytes + size_bytes // 4 + (64 << 20)) as store:

        def write() -> None:
            with store.write(token_ids) as writer:
                for layer in range(layers):
                    writer.put(layer, tokens=slice(0, chunk_tokens), keys=keys[layer], values=values[layer])
                writer.commit()
            store.pool.evict(store.prompt(token_ids).path.keys[0])

        writer = store.write(token_ids)
        spans = spans_of(writer.transaction)
        span_of = {layer: span.index for span in spec.spans[0] for layer in span.layers}

        def gather() -> None:
            for layer in range(layers):
                for tensor, array in enumerate((keys[layer], values[layer])):
                    view = view_array(array, DType.FLOAT32, "source")
                    span = spans[0, span_of[layer]]
                    gather_tokens(span, layer, tensor, WHOLE, view, 0, chunk_tokens, spec.block_tokens)

        rows.append(compare(f"gather, {case}", size_bytes / 1e9, "GB/s", gather, "memcpy", memcpy, rounds=rounds))
        writer.abort("measured")
        rows.append(
            compare(
                f"write: gather + CRC32C + framing + commit, {case}",
                size_bytes / 1e9, "GB/s", write, "memcpy", memcpy, rounds=rounds,
            )
        )  # fmt: skip
        with store.write(token_ids) as writer:
            for layer in range(layers):
                writer.put(layer, tokens=slice(0, chunk_tokens), keys=keys[layer], values=values[layer])
            writer.commit()
        with store.read(store.match(np.append(token_ids, 0))) as lease:

            def scatter() -> None:
                for layer in range(layers):
                    lease.layer(layer).copy_to(keys=keys[layer], values=values[layer])

            rows.append(compare(f"scatter, {case}", size_bytes / 1e9, "GB/s", scatter, "memcpy", memcpy, rounds=rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=256, help="working set of each side")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gather_vs_memcpy.json"))
    arguments = parser.parse_args()
    rows: list[Row] = []
    for piece_kib in (16, 32, 128, 1024):
        rows += measure(piece_kib << 10, arguments.mebibytes << 20, arguments.rounds)
    report("Gather into records and back, against one memcpy of the same bytes", rows, arguments.output)


if __name__ == "__main__":
    main()
