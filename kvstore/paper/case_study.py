"""The paper's case study, computed: 32 H200 that prefill for 64 H20, and its two baselines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING

from kvstore.paper.prefill_time import prefill_mean_s, prefill_quantile_s
from kvstore.profiles import load_profile
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.planning.lengths import TruncatedLogNormal
from kvstore.schedule.planning.plan import Split, Traffic, plan_of
from kvstore.schedule.planning.throughput import throughput

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.profile import Profile
    from kvstore.schedule.planning.plan import Convention, Plan
    from kvstore.schedule.planning.throughput import Throughput

LENGTHS = TruncatedLogNormal(mu=9.90, sigma=1.00, tokens_min=128, tokens_max=128 * 1024)
TRAFFIC = Traffic(LENGTHS, output_tokens=1024)
CONVENTION: Convention = "at-mean"
"""A throughput is that of the mean length, N / T(E[L | ...]), as the paper's equations write it."""
THRESHOLD_TOKENS = 19_400
LINK_BYTES_PER_S = 100e9 / 8
SEARCH_STEP_TOKENS = 100
"""Of the thresholds that the search tries: the last digit of the printed one."""
P90 = 0.9
PREFILL_ALONE = "TTFT: prefill alone"
"""The paper does not say what its TTFT columns count; that it is this was inferred from their numbers."""

PRFAAS_PD = "PrfaaS-PD"
HOMOGENEOUS = "homogeneous PD"
NAIVE = "naive heterogeneous"


@dataclass(frozen=True)
class Figure:
    """One figure that was computed.

    Attributes:
        inferred_inputs: what went into it that the paper does not print: `profile: what of it`, or `PREFILL_ALONE`. A
            Θ has the inputs of its binding term, Λ_max those of all three Θ.
    """

    value: float
    inferred_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseStudy:
    """All figures of the case study under one convention.

    Attributes:
        h200, h20: profiles of an instance of the prefill cluster, and of the PD cluster.
        traffic: lengths of prompts, and output tokens.
        convention: of service times.
    """

    h200: Profile
    h20: Profile
    traffic: Traffic = TRAFFIC
    convention: Convention = CONVENTION

    def figures(self) -> dict[tuple[str, str, str], Figure]:
        """Figures by table, row and quantity."""
        lengths = self.traffic.lengths
        share = lengths.share(above=THRESHOLD_TOKENS)
        decode = inferred(self.h20, "decode_step", "decode_batch_max")
        prefill = inferred(self.h200, "prefill"), inferred(self.h20, "prefill")
        both = (*prefill[0], *prefill[1])
        egress_gbps = self.prfaas_pd.link_bytes_per_s("prfaas", "pd") * 8 / 1e9
        found = {
            ("traffic", "prompts", "mean_tokens"): Figure(lengths.mean()),
            ("case study", PRFAAS_PD, "share_above"): Figure(share),
            ("case study", PRFAAS_PD, "mean_above_tokens"): Figure(lengths.mean(above=THRESHOLD_TOKENS)),
            ("case study", PRFAAS_PD, "egress_gbps"): Figure(egress_gbps, (*both, *inferred(self.h200, "kv"), *decode)),
        }
        bands = {
            PRFAAS_PD: [(0.0, THRESHOLD_TOKENS, self.h20), (THRESHOLD_TOKENS, inf, self.h200)],
            HOMOGENEOUS: [(0.0, inf, self.h20)],
            NAIVE: [(0.0, inf, self.h200)],
        }
        prefill_inputs = {PRFAAS_PD: both, HOMOGENEOUS: prefill[1], NAIVE: prefill[0]}
        parts = {
            "prfaas_requests_per_s": ("prefill of prfaas", prefill[0]),
            "pd_prefill_requests_per_s": ("prefill of pd", prefill[1]),
            "pd_decode_requests_per_s": ("decode of pd", decode),
        }
        base = self.homogeneous.requests_per_s
        deployments = {PRFAAS_PD: self.prfaas_pd, HOMOGENEOUS: self.homogeneous, NAIVE: self.naive}
        for row, result in deployments.items():
            inputs = prefill_inputs[row]
            ttft_mean_s = prefill_mean_s(lengths, bands[row])
            ttft_p90_s = prefill_quantile_s(lengths, bands[row], P90)
            found["case study", row, "ttft_mean_s"] = Figure(ttft_mean_s, (*inputs, PREFILL_ALONE))
            found["case study", row, "ttft_p90_s"] = Figure(ttft_p90_s, (*inputs, PREFILL_ALONE))
            loaded = {part.name for part in result.parts}
            for quantity, (part, part_inputs) in parts.items():
                if part in loaded:
                    found["case study", row, quantity] = Figure(result.part(part).requests_per_s, part_inputs)
            rate = result.requests_per_s
            found["case study", row, "requests_per_s"] = Figure(rate, (*inputs, *decode))
            ratio_inputs = tuple(dict.fromkeys((*inputs, *prefill[1], *decode)))
            found["case study", row, "ratio"] = Figure(rate / base, ratio_inputs)
        searched = {PRFAAS_PD: (self.best_prfaas_pd, both), HOMOGENEOUS: (self.best_homogeneous, prefill[1])}
        for row, (best, inputs) in searched.items():
            all_inputs = (*inputs, *decode)
            (split,) = best.plan.splits
            for threshold in best.plan.thresholds:
                found["search", row, "threshold_tokens"] = Figure(threshold, all_inputs)
            found["search", row, "prefill_instances"] = Figure(split.prefill_instances, all_inputs)
            found["search", row, "decode_instances"] = Figure(split.decode_instances, all_inputs)
            found["search", row, "requests_per_s"] = Figure(best.requests_per_s, all_inputs)
        return found

    @cached_property
    def prfaas_pd(self) -> Throughput:
        """At the printed threshold and division."""
        return throughput(
            self._with_prfaas(3, 5), plan_of((("pd",), ("prfaas",)), (THRESHOLD_TOKENS,)), self.traffic, self.convention
        )

    @cached_property
    def homogeneous(self) -> Throughput:
        """96 H20 alone, divided as printed."""
        return throughput(self._alone(9, 3), plan_of((("pd",),)), self.traffic, self.convention)

    @cached_property
    def naive(self) -> Throughput:
        """The H200 prefill every prompt, and all H20 decode."""
        return throughput(self._with_prfaas(0, 8), plan_of((("prfaas",),)), self.traffic, self.convention)

    @cached_property
    def best_prfaas_pd(self) -> Throughput:
        """The best threshold and division of the H20, every one of them tried.

        As in the paper, each cluster has lengths of its own. `exhaustive_plan` also tries clusters that share lengths.
        """
        lengths = self.traffic.lengths
        first = int(lengths.tokens_min // SEARCH_STEP_TOKENS + 1) * SEARCH_STEP_TOKENS
        thresholds = range(first, int(lengths.tokens_max), SEARCH_STEP_TOKENS)
        plans = (
            plan_of((("pd",), ("prfaas",)), (float(tokens),), (split,))
            for split in _divisions(8)
            for tokens in thresholds
        )
        return self._best(self._with_prfaas(3, 5), plans)

    @cached_property
    def best_homogeneous(self) -> Throughput:
        """The best division of 96 H20."""
        return self._best(self._alone(9, 3), (plan_of((("pd",),), splits=(split,)) for split in _divisions(12)))

    def _best(self, deployment: Deployment, plans: Iterable[Plan]) -> Throughput:
        results = (throughput(deployment, plan, self.traffic, self.convention) for plan in plans)
        return max(results, key=lambda result: result.requests_per_s)

    def _with_prfaas(self, prefill_instances: int, decode_instances: int) -> Deployment:
        return Deployment(
            (
                Cluster("prfaas", self.h200, 4, 0),
                Cluster("pd", self.h20, prefill_instances, decode_instances),
            ),
            (Link("prfaas", "pd", LINK_BYTES_PER_S),),
        )

    def _alone(self, prefill_instances: int, decode_instances: int) -> Deployment:
        return Deployment((Cluster("pd", self.h20, prefill_instances, decode_instances),))


def case_study() -> CaseStudy:
    """With the profiles of the package."""
    return CaseStudy(load_profile("paper-1t-h200"), load_profile("paper-1t-h20"))


def _divisions(instances: int) -> tuple[Split, ...]:
    """Of the PD cluster's instances: at least one prefills, and at least one decodes."""
    return tuple(Split("pd", prefill, instances - prefill) for prefill in range(1, instances))


def inferred(profile: Profile, *parts: str) -> tuple[str, ...]:
    """Those of the parts of a profile that the paper does not print."""
    known = dict(profile.inferred)
    return tuple(f"{profile.name}: {part}" for part in parts if part in known)
