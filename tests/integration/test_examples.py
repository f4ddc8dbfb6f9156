"""Every numbered example runs as a script, says what it promises and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = {
    "02_prefix_reuse.py": ("torch", "transformers", "resumed at 256", "bit for bit"),
    "03_handover.py": ("torch", "transformers", "handed over 200 tokens", "PeerGoneError", "decodes the same tokens"),
    "05_workers.py": ("2 workers wrote 256 tokens", "bit for bit", "party 0 of 2 gave up"),
    "06_two_stores.py": ("81920 bytes of 40 tokens", "resumes at 40 tokens, bit for bit", "nobody listens"),
    "07_node.py": ("ready at tcp://127.0.0.1:", "an engine of the host reads 40 tokens", "draining: PeerClosingError"),
    "09_pool_larger_than_memory.py": ("records did not stay in memory", "found in: {'ssd': 16}"),
    "08_fetch.py": (
        "has 256 of 259 tokens, 262144 bytes",
        "without the salt it has 0",
        "fetched 256 tokens in 262144 bytes",
        "resumes at 256 tokens, bit for bit",
        "a second fetch moves 0 bytes",
        "refused: ",
        "serves=True",
    ),
    "10_watch_a_store.py": (
        "42 blocks were there",
        "hit: 640 of 640 tokens in dram",
        "blocks from dram: evicted",
        "missed: 0 of 640 tokens, evicted",
        "2 matches found 640 of 1280 tokens",
        "attention 'attention': reaches",
    ),
    "16_route_requests.py": (
        "2000 tokens: fast prefills from 0, home decodes",
        "48000 tokens: fast prefills from 0, home decodes",
        "fast is crowded, 2000 tokens: home prefills",
        "s worse: waits for prefill",
        "48000 tokens of which home has 40000",
        "the link is down: home prefills",
        "may only be seen by fast: nobody",
    ),
    "17_profiles.py": (
        "Qwen3-235B (dense)",
        "refused: the curve falls",
        "read back: my-model",
    ),
    "14_jax_mamba2.py": ("jax", "resumes at 130 of 150 tokens", "bit for bit", "lost conv or ssm state is noticed"),
    "15_simulate_and_report.py": ("threshold: ", "adaptive: ", "prefill: ", "stable: True, True", "of 100 Gbit/s"),
    "04_read_record_with_pyarrow.py": ("kvstore.fingerprint", "layer 1, keys (bfloat16): [tokens 6, rows 2, dim0 4]"),
}
WITH_ENGINES = {
    "11_vllm_prefix_cache.py": "vllm",
    "12_vllm_prefill_decode.py": "vllm",
    "13_sglang_hicache.py": "sglang",
}
"""Run by `make test-engines`; here they say what is missing."""

ELSEWHERE = {"01_prefill_decode.py", *WITH_ENGINES}
"""The demo has tests of its own."""


def test_every_example_is_run() -> None:
    found = {path.name for path in (ROOT / "examples").glob("[0-9]*.py")}
    assert found - ELSEWHERE == set(PROMISES)


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_example(name: str) -> None:
    expected = list(PROMISES[name])
    while expected[0] in ("jax", "torch", "transformers"):
        pytest.importorskip(expected.pop(0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, timeout=100, env=environment
    )
    assert done.returncode == 0, done.stderr
    for phrase in expected:
        assert phrase in done.stdout, done.stdout


@pytest.mark.parametrize("name", sorted(WITH_ENGINES))
def test_example_without_its_engine(name: str) -> None:
    hidden = f"import sys, runpy; sys.modules[{WITH_ENGINES[name]!r}] = None; "
    hidden += "import importlib.util as u; find = u.find_spec; "
    hidden += f"u.find_spec = lambda name, *rest: None if name == {WITH_ENGINES[name]!r} else find(name, *rest); "
    done = subprocess.run(
        [sys.executable, "-c", hidden + "runpy.run_path(sys.argv[1], run_name='__main__')", f"{ROOT}/examples/{name}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped: " in done.stdout
    assert "is not installed" in done.stdout
