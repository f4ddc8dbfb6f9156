"""Results as a simulation would return them, written down or drawn from a seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.scenario import PolicyChoice, Scenario, Workload
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.simulate.result import (
    PARTS,
    CacheCounts,
    Happening,
    Outcome,
    RequestTable,
    Samples,
    SimulationResult,
)

PROFILE = Profile(
    "toy", "written down", PolynomialCurve((0.1, 1e-4)), KvSize(1e6, 1e3), PolynomialCurve((0.02,)), 4, 8, 131_072
)
LINK_BYTES_PER_S = 1e9


def scenario(name: str = "toy", **changes: Any) -> Scenario:
    """Two clusters, one of which only prefills."""
    far = Cluster("far", PROFILE, prefill_instances=2, decode_instances=0)
    near = Cluster("near", PROFILE, prefill_instances=2, decode_instances=3)
    deployment = Deployment((far, near), (Link("far", "near", LINK_BYTES_PER_S, 0.02),))
    made = Scenario(name, deployment, Workload(), Slo(ttft_s=2.0, tpot_s=0.05, share=0.9), PolicyChoice("threshold"))
    return replace(made, **changes)


def table(rows: list[dict[str, Any]]) -> RequestTable:
    """A row per dictionary; what is not given is a request that was prefilled far and decoded near, and ended well."""
    defaults: dict[str, Any] = {
        "arrival_s": 0.0,
        "prompt_tokens": 1000,
        "output_tokens": 100,
        "cached_tokens": 0,
        "possible_tokens": 0,
        "tier": -1,
        "prefill": 0,
        "decode": 1,
        "outcome": Outcome.DONE,
        "parts": (0.5, 0.0, 0.0, 0.4, 0.1, 0.0),
        "tpot_s": 0.02,
        "prefix_bytes": 0.0,
        "handover_bytes": 2e6,
    }
    full = [{**defaults, **row} for row in rows]
    for row in full:
        row.setdefault("ttft_s", float(sum(row["parts"])))
        row.setdefault("finished_s", row["arrival_s"] + row["ttft_s"] + row["tpot_s"] * (row["output_tokens"] - 1))
    kinds = {"tier": np.int8, "prefill": np.int16, "decode": np.int16, "outcome": np.int8}
    kinds |= dict.fromkeys(("prompt_tokens", "output_tokens", "cached_tokens", "possible_tokens"), np.int64)
    columns: dict[str, Any] = {
        name: np.array([row[name] for row in full], kinds.get(name, np.float64))
        for name in RequestTable.__dataclass_fields__
    }
    columns["parts"] = columns["parts"].reshape(len(full), len(PARTS))
    return RequestTable(**columns)


def samples(count: int, step_s: float = 1.0, **by_name: Any) -> Samples:
    """Quiet ones, at `step_s`, `2 * step_s` and so on; `near_waiting=[...]` and the like say more."""
    names = ("far", "near")
    zero = np.zeros(count)
    given = {name: np.asarray(values, np.float64) for name, values in by_name.items() if name != "policy"}
    return Samples(
        at_s=np.arange(1, count + 1) * step_s,
        prefill_waiting={name: given.get(f"{name}_waiting", zero) for name in names},
        prefill_busy={name: given.get(f"{name}_busy", zero) for name in names},
        prefill_instances={name: np.full(count, 2.0) for name in names},
        decode_running={"far": zero, "near": given.get("near_running", zero)},
        decode_waiting={"far": zero, "near": given.get("near_decode_waiting", zero)},
        decode_instances={"far": zero, "near": np.full(count, 3.0)},
        link_bytes={("far", "near"): given.get("link_bytes", zero)},
        link_capacity_bytes_per_s={("far", "near"): given.get("capacity", np.full(count, LINK_BYTES_PER_S))},
        policy=by_name.get("policy", {}),
    )


def result(rows: list[dict[str, Any]], sampled: Samples | None = None, **changes: Any) -> SimulationResult:
    """One run."""
    made = SimulationResult(
        scenario=scenario(),
        requests=table(rows),
        samples=samples(10) if sampled is None else sampled,
        happenings=(),
        caches=(),
        tiers=("dram", "ssd"),
        end_s=100.0,
        is_stable=True,
        wall_s=0.5,
    )
    return replace(made, **changes)


def drawn(seed: int, requests: int = 400, **changes: Any) -> SimulationResult:
    """A lively run: both routes, all outcomes, hits in both tiers, a fault."""
    draw = np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(0.25, requests))
    rows: list[dict[str, Any]] = []
    for arrival_s in arrivals.tolist():
        tokens = int(np.clip(draw.lognormal(9.0, 1.0), 128, 131_072))
        cached = int(draw.choice((0, tokens // 512 * 256)))
        outcome = Outcome(int(draw.choice((1, 1, 1, 1, 1, 1, 1, 2, 3, 0))))
        row: dict[str, Any] = {
            "arrival_s": arrival_s,
            "prompt_tokens": tokens,
            "cached_tokens": cached,
            "possible_tokens": tokens // 512 * 512,
            "tier": int(draw.integers(2)) if cached else -1,
            "prefill": int(tokens < 8000),
            "outcome": outcome,
            "parts": tuple(draw.exponential((0.5, 0.02, 0.01, 0.6, 0.2, 0.05))),
            "tpot_s": float(draw.uniform(0.01, 0.06)),
        }
        if outcome is not Outcome.DONE:
            row |= {"ttft_s": np.nan, "tpot_s": np.nan, "finished_s": np.nan, "parts": (np.nan,) * 6}
        if outcome is Outcome.REJECTED:
            row |= {"prefill": -1, "decode": -1, "tier": -1, "cached_tokens": 0}
        rows.append(row)
    count = int(arrivals[-1]) + 1
    sampled = samples(
        count,
        far_waiting=draw.poisson(3, count),
        near_waiting=draw.poisson(1, count),
        far_busy=draw.integers(0, 3, count),
        near_busy=draw.integers(0, 3, count),
        near_running=draw.integers(0, 12, count),
        near_decode_waiting=draw.poisson(1, count),
        link_bytes=draw.uniform(0, LINK_BYTES_PER_S, count),
        capacity=np.where((np.arange(count) > 30) & (np.arange(count) < 50), 0.5, 1.0) * LINK_BYTES_PER_S,
        policy={"mode": draw.integers(0, 2, count).astype(float), "threshold_tokens": np.full(count, 8000.0)},
    )
    happenings = (
        Happening(30.0, "link fault", "far > near", "carries half of its rate"),
        Happening(50.0, "link fault over", "far > near", "carries all of its rate"),
    )
    caches = (
        CacheCounts("near", "dram", 1e9, 9e8, 3_000_000, 900_000, 5e7),
        CacheCounts("near", "ssd", 1e10, 2e9, 2_100_000, 100_000, 0.0),
    )
    return result(rows, sampled, happenings=happenings, caches=caches, end_s=float(arrivals[-1]) + 20, **changes)
