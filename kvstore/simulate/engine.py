"""The simulation: requests arrive, are routed, prefilled, handed over and decoded."""

from __future__ import annotations

from math import inf, nextafter
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import SimulationError
from kvstore.keys import KEY_BYTES
from kvstore.limits import SIMULATED_ATTEMPTS_MAX, SIMULATED_DRAIN_S
from kvstore.schedule.policies.answers import ExpectedAnswer
from kvstore.schedule.policies.snapshot import NOTHING_CACHED, RoutingRequest
from kvstore.simulate.asking import Policies
from kvstore.simulate.coming import Coming
from kvstore.simulate.conversions import Conversions
from kvstore.simulate.events import Events
from kvstore.simulate.faults import Faults, check_faults
from kvstore.simulate.job import DECODE_WAIT, LOAD, PREFILL, PREFIX, QUEUE, TRANSFER, Job
from kvstore.simulate.links import Links
from kvstore.simulate.recording import Recording
from kvstore.simulate.result import Outcome, SimulationResult
from kvstore.simulate.sampling import Sampler
from kvstore.simulate.site import Site
from kvstore.simulate.stability import is_stable
from kvstore.simulate.telemetry import Telemetry
from kvstore.workload.seen import SeenKeys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvstore.profile import Profile
    from kvstore.scenario import Scenario
    from kvstore.schedule.planning.plan import Plan
    from kvstore.schedule.policies.admit import AdmissionPolicy
    from kvstore.schedule.policies.convert import ConversionPolicy
    from kvstore.schedule.policies.policy import Route, RoutingPolicy
    from kvstore.schedule.policies.snapshot import CachedPrefix
    from kvstore.simulate.cache import ClusterCache
    from kvstore.workload.request import Request

DRAIN_FACTOR = 10.0
"""Behind the last arrival, time goes on for so many times the span of arrivals and `SIMULATED_DRAIN_S`, at most."""
PROGRESS_EVERY_REQUESTS = 1000


class Simulation:
    """One run over one workload. Not thread-safe.

    It owns time, queues, links and bookkeeping, and decides nothing: routes come from the policy, prefill times from
    the service models, what is kept from the caches.

    Args:
        requests: numbered from 0 without holes; those without `after` in the order of their arrivals.
        policy: decides where requests go.
        caches: by cluster; a cluster without one keeps nothing.
        admission: turns requests away early; None lets all in that have a route.
        conversion: says when an instance changes its role; None for never.
        retuned: the router for a plan that `conversion` has made; None keeps the one that there is.
        progress: told the time of the simulation now and then.

    Raises:
        SimulationError: faults or cross traffic name what is not there.
    """

    def __init__(
        self,
        scenario: Scenario,
        requests: Iterable[Request],
        policy: RoutingPolicy[Any],
        caches: Mapping[str, ClusterCache],
        *,
        admission: AdmissionPolicy | None = None,
        conversion: ConversionPolicy | None = None,
        retuned: Callable[[Plan], RoutingPolicy[Any] | None] = lambda _: None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        check_faults(scenario)
        if not scenario.telemetry_s > 0:
            raise SimulationError(f"telemetry_s={scenario.telemetry_s} must be positive")
        self._scenario = scenario
        self._policies = Policies(policy, admission, conversion, retuned)
        self._progress = progress
        self._events = Events()
        self._links = Links(scenario.deployment, self._events, scenario.cross_traffic)
        self._sites = {
            cluster.name: Site(
                number,
                cluster,
                caches.get(cluster.name),
                self._events,
                start=self._start,
                placed=self._placed,
                finished=self._finished,
            )
            for number, cluster in enumerate(scenario.deployment.clusters)
        }
        self._cached_sites = [(name, site.cache) for name, site in self._sites.items() if site.cache is not None]
        self._service = scenario.deployment.prefill_service
        self._faults = Faults(
            scenario,
            self._events,
            self._links,
            self._sites,
            np.random.default_rng([scenario.seed, 0x6661756C74]),
            prefill_lost=self._prefill_lost,
            decode_lost=self._decode_lost,
            prefill_changed=self._unstrand,
            link_back=self._link_back,
        )
        self._recording = Recording()
        self._seen = SeenKeys()
        self._answer = ExpectedAnswer()
        self._sampler = Sampler(self._sites.values(), self._links.lines)
        self._tiers: dict[str, int] = {}
        self._jobs: dict[int, Job] = {}
        self._conversions = Conversions(self._events, self._sites, self._unstrand)
        self._telemetry = Telemetry(self._events, self._sites, self._links.lines, self._service)
        self._coming = Coming(
            requests,
            self._events,
            inf if scenario.duration_s is None else scenario.duration_s,
            known=self._recording.begin,
            arrive=self._arrive,
            has_ended=self._has_ended,
        )

    def run(self) -> SimulationResult:
        """Until every request has ended, nothing can happen any more, or the time behind the last arrival is over."""
        begin = perf_counter()
        self._observe(None)
        self._events.watch(SIMULATED_DRAIN_S, self._cut_off)
        self._coming.pull()
        self._events.run(inf)
        end_s = self._events.now_s
        # What is left either waits for something that never comes, or was cut off.
        outcome = Outcome.PENDING if self._events.ahead else Outcome.FAILED
        for job in self._jobs.values():
            self._recording.ended(job, outcome, end_s, self._tier_of(job))
        requests = self._recording.table()
        happened = [*self._faults.happenings, *self._conversions.happenings]
        return SimulationResult(
            scenario=self._scenario,
            requests=requests,
            samples=self._sampler.samples(),
            happenings=tuple(sorted(happened, key=lambda each: each.at_s)),
            caches=tuple(counts for _, cache in self._cached_sites for counts in cache.counts()),
            tiers=tuple(self._tiers),
            end_s=end_s,
            is_stable=is_stable(requests),
            wall_s=perf_counter() - begin,
        )

    def _drained_s(self) -> float:
        return self._coming.last_s * (1.0 + DRAIN_FACTOR) + SIMULATED_DRAIN_S

    def _has_ended(self, number: int) -> bool:
        return self._recording.outcome[number] != Outcome.PENDING

    def _arrive(self, request: Request) -> None:
        now_s = self._events.now_s
        possible_tokens = 0
        if request.keys:
            blocks = self._seen.blocks(request.keys)
            possible_tokens = min(blocks * self._scenario.block_tokens, request.prompt_tokens - 1)
            self._seen.add(request.keys[blocks * KEY_BYTES :])
        self._recording.arrived(request.number, now_s, possible_tokens)
        if self._progress is not None and not request.number % PROGRESS_EVERY_REQUESTS:
            self._progress(now_s)
        job = self._jobs[request.number] = Job(request, now_s)
        self._route(job)

    def _route(self, job: Job) -> None:
        snapshot, asked = self._telemetry.snapshot(), self._asked(job.request)
        route = self._policies.ask(snapshot, asked) if job.attempt else self._policies.let_in(snapshot, asked)
        if route is None:
            self._turn_away(job)
        else:
            self._send(job, route, asked.cached)

    def _asked(self, request: Request) -> RoutingRequest:
        cached: dict[str, CachedPrefix] = {}
        if request.keys:
            for name, cache in self._cached_sites:
                prefix = cache.find(request)
                if prefix is not NOTHING_CACHED:
                    cached[name] = prefix
        return RoutingRequest(request.prompt_tokens, self._answer.tokens, cached)

    def _send(self, job: Job, route: Route, cached: Mapping[str, CachedPrefix]) -> None:
        request = job.request
        job.route = route
        job.prefill = prefill = self._sites[route.prefill]
        job.decode = decode = self._sites[route.decode]
        source = route.prefix_from if route.prefix_from is not None and route.prefix_from != route.prefill else None
        job.prefix_site = prefill if source is None else self._sites[source]
        job.prefix = cached.get(job.prefix_site.name, NOTHING_CACHED)
        job.resume_tokens = route.resume_tokens
        job.stores = prefill.stores
        job.present_tokens = cached.get(decode.name, NOTHING_CACHED).attention_tokens
        if job.resume_tokens > job.prefix.resume_tokens:
            raise SimulationError(
                f"policy {self._policies.name!r} resumes request {request.number} at {job.resume_tokens} tokens, where "
                f"cluster {job.prefix_site.name!r} has {job.prefix.resume_tokens}"
            )
        job.service_s = self._service_s(prefill.profile, request.prompt_tokens, job.resume_tokens)
        prefill.prefill.expect(job)
        decode.decode.expected += 1
        if not job.resume_tokens:
            self._enqueue(job)
            return
        if job.prefix.load_s > 0:
            self._events.at(self._events.now_s + job.prefix.load_s, self._loaded, job)
        else:
            self._loaded(job)

    def _service_s(self, profile: Profile, tokens: int, resume_tokens: int) -> float:
        if self._service.kind == "whole":
            return profile.prefill_s(tokens, resume_tokens)
        return self._service.service(profile, tokens, resume_tokens).prefill_s

    def _loaded(self, job: Job) -> None:
        """The prefix is in the memory of the cluster that has it."""
        job.passed(LOAD, self._events.now_s)
        site = job.prefill
        if job.prefix_site is site:
            self._enqueue(job)
            return
        have = site.cache.find(job.request).attention_tokens if site.cache is not None else 0
        amount_bytes = site.profile.kv.missing_bytes(job.resume_tokens, have)
        job.prefix_bytes += amount_bytes
        self._checked_line(job, job.prefix_site.name, site.name)
        self._links.send(job.prefix_site.name, site.name, amount_bytes, self._moved, job)

    def _moved(self, job: Job) -> None:
        """The prefix has come from another cluster, and is kept here."""
        job.passed(PREFIX, self._events.now_s)
        blocks = job.resume_tokens // self._scenario.block_tokens
        self._store(job.prefill, job, job.request.keys[: blocks * KEY_BYTES], job.resume_tokens, job.resume_tokens - 1)
        job.stores = job.prefill.stores
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        site = job.prefill
        site.prefill.enqueue(job)
        if not site.prefill.instances:
            self._move_on(site)

    def _unstrand(self) -> None:
        """Instances have gone or come back: who waits where there is none may have another way."""
        for site in self._sites.values():
            if not site.prefill.instances and site.prefill.queued:
                self._move_on(site)

    def _link_back(self) -> None:
        """Policies hear of it with the next telemetry."""
        self._events.at(self._events.now_s + self._scenario.telemetry_s, lambda _: self._unstrand())

    def _move_on(self, site: Site) -> None:
        """Route anew what waits at a cluster without an instance; what has no other way waits on.

        Nobody who was let in is asked about again, and no attempt is counted: no instance was at it.
        """
        for job in site.prefill.recall():
            asked = self._asked(job.request)
            route = self._policies.ask(self._telemetry.snapshot(), asked)
            if route is not None and self._sites[route.prefill].prefill.instances:
                job.passed(QUEUE, self._events.now_s)
                site.prefill.expected -= 1
                job.decode.decode.expected -= 1
                self._send(job, route, asked.cached)
            else:
                site.prefill.enqueue(job)

    def _start(self, job: Job, instance: int) -> None:
        """An instance turns to a prompt."""
        now_s = self._events.now_s
        has_waited = now_s > job.since_s
        job.passed(QUEUE, now_s)
        site = job.prefill
        load_s = 0.0
        if has_waited and site.cache is not None and site.stores != job.stores and job.request.keys:
            # Prompts that were before it may have left what it needs.
            prefix = site.cache.find(job.request)
            if prefix.resume_tokens > max(job.resume_tokens, job.prefix.resume_tokens):
                job.prefix, job.prefix_site, job.resume_tokens = prefix, site, prefix.resume_tokens
                load_s = prefix.load_s
        cache = job.prefix_site.cache if job.resume_tokens else site.cache
        if cache is not None and job.request.keys:
            cache.used(job.request, job.prefix if job.resume_tokens else NOTHING_CACHED)
        job.service_s = self._service_s(site.profile, job.request.prompt_tokens, job.resume_tokens)
        job.end_s = now_s + load_s + job.service_s
        if load_s > 0:
            self._events.at(now_s + load_s, self._compute, (job, job.attempt, instance))
        else:
            self._compute((job, job.attempt, instance))

    def _compute(self, which: tuple[Job, int, int]) -> None:
        """The prefix is in the instance; what prefill makes leaves as it is made."""
        job, attempt, _ = which
        if job.attempt != attempt:
            return
        now_s = self._events.now_s
        if now_s > job.since_s:
            job.passed(LOAD, now_s)
        if job.decode is not job.prefill:
            tokens, kv = job.request.prompt_tokens, job.prefill.profile.kv
            amount_bytes = kv.missing_bytes(tokens, job.present_tokens)
            job.handover_bytes += amount_bytes
            # In chunks, states are only final with the last one.
            early_bytes = amount_bytes
            if self._service.kind == "chunked":
                early_bytes -= min(kv.resume_bytes(tokens), amount_bytes)
            rate = early_bytes / job.service_s if job.service_s > 0 else inf
            self._checked_line(job, job.prefill.name, job.decode.name)
            job.flow = self._links.produce(
                job.prefill.name, job.decode.name, amount_bytes, rate, self._handed_over, job
            )
        self._events.at(job.end_s, self._prefilled, which)

    def _prefilled(self, which: tuple[Job, int, int]) -> None:
        job, attempt, instance = which
        if job.attempt != attempt:
            return
        now_s = self._events.now_s
        job.passed(PREFILL, now_s)
        site, request = job.prefill, job.request
        site.prefilled(now_s - job.arrival_s)
        self._store(site, job, request.keys, request.prompt_tokens, job.resume_tokens)
        flow = job.flow
        if flow is None:
            job.decode.decode.join(job)
        else:
            job.flow = None
            self._links.produced(flow)
        site.prefill.finished(instance)

    def _handed_over(self, job: Job) -> None:
        """The decoding cluster has the whole cache."""
        job.passed(TRANSFER, self._events.now_s)
        request = job.request
        # What crossed contains the states at the prompt's end, and no others.
        self._store(job.decode, job, request.keys, request.prompt_tokens, request.prompt_tokens - 1)
        job.decode.decode.join(job)

    def _placed(self, job: Job) -> None:
        now_s = self._events.now_s
        job.passed(DECODE_WAIT, now_s)
        job.first_s = now_s
        self._recording.first_token(job)

    def _finished(self, job: Job) -> None:
        request = job.request
        self._answer = self._answer.ended(request.output_tokens)
        if request.end_keys:
            tokens = request.prompt_tokens + request.output_tokens
            self._store(job.decode, job, request.end_keys, tokens, request.prompt_tokens)
            self._seen.add(request.end_keys[len(request.keys) :])
        self._end(job, Outcome.DONE)

    def _store(self, site: Site, job: Job, keys: bytes, tokens: int, resume_tokens: int) -> None:
        if site.cache is not None and keys:
            site.cache.store(job.request, keys=keys, tokens=tokens, resume_tokens=resume_tokens)
            site.stores += 1

    def _prefill_lost(self, job: Job) -> None:
        """The instance that was at it failed: the prompt is routed again, and what passed counts as waiting."""
        job.attempt += 1
        job.passed(QUEUE, self._events.now_s)
        if job.flow is not None:
            job.handover_bytes -= self._links.cancel(job.flow)
            job.flow = None
        job.decode.decode.expected -= 1
        if job.attempt >= SIMULATED_ATTEMPTS_MAX:
            self._end(job, Outcome.FAILED)
        else:
            self._route(job)

    def _decode_lost(self, job: Job) -> None:
        """The instance that decoded it failed, with a part of the answer out already."""
        self._end(job, Outcome.FAILED)

    def _turn_away(self, job: Job) -> None:
        if job.attempt:
            self._end(job, Outcome.FAILED)
            return
        self._recording.turned_away(job.request.number, self._events.now_s)
        self._leave(job)

    def _end(self, job: Job, outcome: Outcome) -> None:
        self._recording.ended(job, outcome, self._events.now_s, self._tier_of(job))
        self._leave(job)

    def _leave(self, job: Job) -> None:
        number = job.request.number
        del self._jobs[number]
        self._coming.ended(number)
        # Nobody is on the way, and those who wait for others wait for nobody who is here.
        if not self._jobs and self._coming.is_over:
            self._events.end()

    def _cut_off(self, _: object) -> None:
        if self._jobs and not self._coming.has_more and self._drained_s() <= self._events.now_s:
            self._events.end()
        else:
            # Whoever arrives puts the end off.
            self._events.watch(max(self._drained_s(), self._events.now_s + SIMULATED_DRAIN_S), self._cut_off)

    def _tier_of(self, job: Job) -> int:
        if not job.resume_tokens:
            return -1
        return self._tiers.setdefault(job.prefix.tier, len(self._tiers))

    def _checked_line(self, job: Job, source: str, target: str) -> None:
        if (source, target) not in self._links.lines:
            raise SimulationError(
                f"policy {self._policies.name!r} sends request {job.request.number} from {source!r} to {target!r}, "
                "where there is no link"
            )

    def _observe(self, _: object) -> None:
        """A telemetry interval ends."""
        now_s = self._events.now_s
        passed_s = self._telemetry.measure()
        conversion = self._policies.tell(self._telemetry.snapshot())
        if conversion is not None:
            self._conversions.begin(conversion)
        if passed_s > 0:
            self._sampler.take(now_s, self._policies.numbers())
        self._events.watch(max(now_s + self._scenario.telemetry_s, nextafter(now_s, inf)), self._observe)
