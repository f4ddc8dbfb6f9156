"""A second simulator for small scenarios: it looks at every job, flow and instance whenever anything happens.

Written from docs/simulate.md, without counters, heaps or shared rates: what is left of each job is a number of its own,
and time goes on to whatever ends first. Without caches, and with routes that are fixed beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, inf, nan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.profile import Profile
    from kvstore.scenario import LinkFault, NodeFault, Scenario
    from kvstore.workload.request import Request

CHUNK_TOKENS = 2048
ATTEMPTS = 4


@dataclass
class BruteJob:
    request: Request
    prefill: str
    decode: str
    arrival_s: float = nan
    phase: str = "to come"
    since_s: float = 0.0
    left: float = 0.0
    """Seconds of thinking, prefill or flight; steps of decode."""
    instance: object = None
    attempts: int = 0
    bytes_left: float = 0.0
    cap: float = 0.0
    is_sending: bool = False
    rate: float = 0.0
    crossed_bytes: float = 0.0
    ttft_s: float = nan
    finished_s: float = nan
    outcome: str = "pending"
    parts: dict[str, float] = field(default_factory=dict)

    def passed(self, part: str, now_s: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + now_s - self.since_s
        self.since_s = now_s


class BruteForce:
    """All of a scenario, for requests whose way is `routes(request)`."""

    def __init__(
        self, scenario: Scenario, requests: Sequence[Request], routes: Callable[[Request], tuple[str, str]]
    ) -> None:
        self.scenario = scenario
        self.now_s = 0.0
        self.jobs = [BruteJob(request, *routes(request)) for request in requests]
        self.clusters = {each.name: each for each in scenario.deployment.clusters}
        self.prefill = {each.name: [object() for _ in range(each.prefill_instances)] for each in self.clusters.values()}
        self.decode = {each.name: [object() for _ in range(each.decode_instances)] for each in self.clusters.values()}
        self.shares = {(each.source, each.target): [1.0] for each in scenario.deployment.links}
        self.changes = sorted(
            [(fault.from_s, 0, number, fault) for number, fault in enumerate(scenario.faults)]
            + [
                (fault.until_s, 1, number, fault) for number, fault in enumerate(scenario.faults) if fault.until_s < inf
            ],
            key=lambda each: each[:3],
        )
        self.gone: dict[int, int] = {}

    def run(self) -> list[BruteJob]:
        for job in self.jobs:
            if job.request.after is None:
                job.phase, job.left = "thinking", job.request.arrival_s
        while any(job.outcome == "pending" for job in self.jobs):
            self._rates()
            left_s = min((self._left_s(job) for job in self.jobs), default=inf)
            change_s = self.changes[0][0] if self.changes else inf
            if left_s == inf and change_s == inf:
                break
            self._pass(min(left_s, max(change_s - self.now_s, 0.0)))
            if self.now_s >= change_s - 1e-12:
                self._change(*self.changes.pop(0)[1:])
            self._settle()
        for job in self.jobs:
            if job.outcome == "pending" and job.phase != "to come":
                self._end(job, "failed")
        return self.jobs

    def _left_s(self, job: BruteJob) -> float:
        found = inf
        if job.phase in ("thinking", "prefill", "flight"):
            found = job.left
        elif job.phase == "decode":
            found = job.left * self._step_s(job)
        if job.is_sending and job.phase == "transfer" and job.rate > 0:
            found = min(found, job.bytes_left / job.rate)
        return max(found, 0.0)

    def _step_s(self, job: BruteJob) -> float:
        batch = sum(1 for each in self.jobs if each.phase == "decode" and each.instance is job.instance)
        return self.clusters[job.decode].profile.decode_step(batch)

    def _pass(self, passed_s: float) -> None:
        steps = {id(job): passed_s / self._step_s(job) for job in self.jobs if job.phase == "decode"}
        self.now_s += passed_s
        for job in self.jobs:
            if job.phase in ("thinking", "prefill", "flight"):
                job.left -= passed_s
            elif job.phase == "decode":
                job.left -= steps[id(job)]
            if job.is_sending:
                job.bytes_left -= job.rate * passed_s
                job.crossed_bytes += job.rate * passed_s

    def _settle(self) -> None:
        """Everything that has come to its end, and what begins because of it."""
        is_moving = True
        while is_moving:
            is_moving = False
            for job in self.jobs:
                is_over = job.left <= 1e-9
                if job.phase == "thinking" and is_over:
                    job.arrival_s = job.since_s = self.now_s
                    job.phase, is_moving = "queue", True
                elif job.phase == "prefill" and is_over:
                    job.passed("prefill_s", self.now_s)
                    job.phase = "transfer" if job.is_sending else "place"
                    job.cap, is_moving = inf, True
                elif job.phase == "transfer" and job.bytes_left <= 1e-3:
                    link = self.scenario.deployment.link(job.prefill, job.decode)
                    assert link is not None
                    job.crossed_bytes += job.bytes_left
                    job.is_sending = False
                    job.phase, job.left, is_moving = "flight", link.round_trip_s, True
                elif job.phase == "flight" and is_over:
                    job.passed("transfer_s", self.now_s)
                    job.phase, is_moving = "place", True
                elif job.phase == "decode" and is_over:
                    job.instance = None
                    self._end(job, "done")
                    is_moving = True
            is_moving |= self._begin_prefills() | self._begin_decodes()

    def _begin_prefills(self) -> bool:
        has_begun = False
        for name, instances in self.prefill.items():
            waiting = [job for job in self.jobs if job.phase == "queue" and job.prefill == name]
            for job in sorted(waiting, key=lambda each: (each.arrival_s, each.request.number)):
                busy = {id(each.instance) for each in self.jobs if each.phase == "prefill"}
                idle = [each for each in instances if id(each) not in busy]
                if idle:
                    self._begin_prefill(job, idle[0])
                    has_begun = True
        return has_begun

    def _begin_prefill(self, job: BruteJob, instance: object) -> None:
        job.passed("queue_s", self.now_s)
        profile, tokens = self.clusters[job.prefill].profile, job.request.prompt_tokens
        is_chunked = self.scenario.deployment.prefill_service.kind == "chunked"
        job.phase, job.instance = "prefill", instance
        job.left = _chunked_s(profile, tokens) if is_chunked else profile.prefill(tokens)
        if job.decode != job.prefill:
            attention_bytes = profile.kv.token_bytes * tokens
            job.bytes_left = attention_bytes + profile.kv.state_bytes
            job.cap = (attention_bytes if is_chunked else job.bytes_left) / job.left
            job.is_sending = True

    def _begin_decodes(self) -> bool:
        has_begun = False
        for name, instances in self.decode.items():
            waiting = [job for job in self.jobs if job.phase == "place" and job.decode == name]
            for job in sorted(waiting, key=lambda each: (each.since_s, each.request.number)):
                sizes = [sum(1 for each in self.jobs if each.instance is one) for one in instances]
                if not sizes or min(sizes) >= self.clusters[name].profile.decode_batch_max:
                    break
                job.passed("decode_wait_s", self.now_s)
                job.ttft_s = self.now_s - job.arrival_s
                job.phase, job.left = "decode", job.request.output_tokens - 1.0
                job.instance = instances[sizes.index(min(sizes))] if job.left else None
                has_begun = True
                if not job.left:
                    self._end(job, "done")
        return has_begun

    def _end(self, job: BruteJob, outcome: str) -> None:
        job.outcome, job.phase, job.finished_s, job.instance, job.is_sending = outcome, "ended", self.now_s, None, False
        for each in self.jobs:
            if each.request.after == job.request.number:
                each.phase, each.left = "thinking", each.request.arrival_s

    def _change(self, is_end: int, number: int, fault: LinkFault | NodeFault) -> None:
        if hasattr(fault, "share"):
            shares = self.shares[fault.source, fault.target]
            shares.remove(fault.share) if is_end else shares.append(fault.share)
            return
        instances = (self.prefill if fault.role == "prefill" else self.decode)[fault.cluster]
        if is_end:
            instances += [object() for _ in range(self.gone.pop(number))]
            return
        assert fault.instances >= len(instances), "which of them fail is drawn, and not known here"
        self.gone[number] = len(instances)
        lost = [job for job in self.jobs if job.phase == fault.role and any(job.instance is one for one in instances)]
        instances.clear()
        for job in lost:
            job.instance, job.is_sending, job.bytes_left = None, False, 0.0
            job.attempts += 1
            if fault.role == "decode" or job.attempts >= ATTEMPTS:
                self._end(job, "failed")
            else:
                job.phase = "queue"

    def _rates(self) -> None:
        """All flows grow alike until something stops them, one after another."""
        growing = [job for job in self.jobs if job.is_sending]
        flows = list(growing)
        for job in flows:
            job.rate = 0.0
        while growing:
            step = min(job.cap - job.rate for job in growing)
            for limit, passes in self._limits():
                members = [job for job in growing if passes(job)]
                if members:
                    step = min(step, max(limit - sum(job.rate for job in flows if passes(job)), 0.0) / len(members))
            for job in growing:
                job.rate += step
            full = [
                passes
                for limit, passes in self._limits()
                if sum(job.rate for job in flows if passes(job)) >= limit * (1 - 1e-12)
            ]
            growing = [
                job for job in growing if job.rate < job.cap * (1 - 1e-12) and not any(passes(job) for passes in full)
            ]

    def _limits(self) -> list[tuple[float, Callable[[BruteJob], bool]]]:
        found: list[tuple[float, Callable[[BruteJob], bool]]] = []
        crossing = {(source, target): share for source, target, share in self.scenario.cross_traffic}
        for link in self.scenario.deployment.links:
            pair = link.source, link.target
            carries = link.bytes_per_s * (1 - crossing.get(pair, 0.0))
            for share in self.shares[pair]:
                carries *= share
            found.append((carries, lambda job, pair=pair: (job.prefill, job.decode) == pair))
        for cluster in self.clusters.values():
            for limit, end in ((cluster.egress_bytes_per_s, "prefill"), (cluster.ingress_bytes_per_s, "decode")):
                if limit is not None:
                    found.append((limit, lambda job, end=end, name=cluster.name: getattr(job, end) == name))
        return found


def _chunked_s(profile: Profile, tokens: int) -> float:
    """Each chunk costs what it adds, and no less than a prompt of its own length."""
    found = 0.0
    for chunk in range(ceil(tokens / CHUNK_TOKENS)):
        begin, end = chunk * CHUNK_TOKENS, min((chunk + 1) * CHUNK_TOKENS, tokens)
        added_s = profile.prefill(end) - (profile.prefill(begin) if begin else 0.0)
        found += max(profile.prefill(end - begin), added_s)
    return found
