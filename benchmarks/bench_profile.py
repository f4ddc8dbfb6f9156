"""What one look into a profile costs: routers and simulators take several for each request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.profiles import load_profile

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

TOKENS, PRESENT_TOKENS = 27_000, 8_192


@pytest.mark.parametrize("name", ["paper-1t-h200", "paper-1t-h20"])
def test_prefill(benchmark: BenchmarkFixture, name: str) -> None:
    """Measured points for the H200, a polynomial for the H20."""
    assert benchmark(load_profile(name).prefill, TOKENS) > 0


@pytest.mark.parametrize("name", ["paper-1t-h200", "paper-1t-h20"])
def test_prefill_behind_a_prefix(benchmark: BenchmarkFixture, name: str) -> None:
    assert benchmark(load_profile(name).prefill_s, TOKENS, PRESENT_TOKENS) > 0


def test_missing_bytes(benchmark: BenchmarkFixture) -> None:
    assert benchmark(load_profile("paper-1t-h200").kv.missing_bytes, TOKENS, PRESENT_TOKENS) > 0


def test_prefill_of_many(benchmark: BenchmarkFixture) -> None:
    """A hundred thousand lengths at once, as the planner asks."""
    lengths = np.geomspace(128, 131_072, 100_000)
    assert benchmark(load_profile("paper-1t-h200").prefill.many, lengths).shape == lengths.shape
