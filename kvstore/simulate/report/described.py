"""What was simulated, in words and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.scenario import LinkFault
from kvstore.simulate.report.wording import MISSING, gbits, number, percent
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from kvstore.scenario import NodeFault, Scenario


def cluster_rows(scenario: Scenario) -> list[tuple[str, ...]]:
    """Name, profile, prefill and decode instances, batch, egress limit, cache: of each cluster."""
    return [
        (
            each.name,
            each.profile.name,
            str(each.prefill_instances),
            str(each.decode_instances),
            str(each.profile.decode_batch_max) if each.decodes else MISSING,
            gbits(each.egress_bytes_per_s),
            f"{format_bytes(each.cache.dram_bytes)} DRAM, {format_bytes(each.cache.ssd_bytes)} SSD",
            f"yes, {each.conversion_s:g} s" if each.convertible else "no",
        )
        for each in scenario.deployment.clusters
    ]


CLUSTER_COLUMNS = ("cluster", "profile", "prefill", "decode", "batch", "egress limit", "cache", "convertible")
LINK_COLUMNS = ("link", "carries", "round trip", "loss", "cross traffic")


def link_rows(scenario: Scenario) -> list[tuple[str, ...]]:
    """Of each link."""
    others = {(source, target): share for source, target, share in scenario.cross_traffic}
    return [
        (
            f"{link.source} → {link.target}",
            gbits(link.bytes_per_s),
            f"{link.round_trip_s * 1e3:g} ms",
            f"{link.loss:.2g}",
            percent(others.get((link.source, link.target), 0.0)),
        )
        for link in scenario.deployment.links
    ]


def setting_rows(scenario: Scenario) -> list[tuple[str, str]]:
    """Everything else, name and value."""
    workload, arrivals, slo = scenario.workload, scenario.workload.arrivals, scenario.slo
    rate = "the trace's own" if arrivals.rate_per_s is None else f"{arrivals.rate_per_s:g}/s"
    shape = {
        "burst": f", bursts of {arrivals.burst_factor:g} times the mean every {arrivals.period_s:g} s",
        "diurnal": f", up to {arrivals.burst_factor:g} times the mean within {arrivals.period_s:g} s",
    }.get(arrivals.kind, "")
    rows = [
        ("workload", f"{workload.kind}{_settings(workload.settings)}"),
        ("arrivals", f"{arrivals.kind}, {rate}{shape}; at most {workload.requests_max:,} requests"),
        ("policy", f"{scenario.policy.name}{_settings(scenario.policy.settings)}"),
        ("SLO", f"{slo.ttft_s:g} s to the first token, {slo.tpot_s * 1e3:g} ms per token, for {percent(slo.share)}"),
        ("prefill service", scenario.deployment.prefill_service.kind),
        ("blocks", f"{scenario.block_tokens} tokens"),
        ("telemetry", f"every {scenario.telemetry_s:g} s"),
        ("time", f"warm-up {scenario.warmup_s:g} s, " + _duration(scenario)),
        ("seed", str(scenario.seed)),
    ]
    if workload.path is not None:
        rows.insert(1, ("trace", workload.path.rpartition("/")[2]))
    rows += [("fault", _fault(fault)) for fault in scenario.faults]
    return rows


def assumptions(scenario: Scenario) -> list[str]:
    """What a reader should know before using a figure."""
    found = [
        "Time to first token ends when the decoding cluster has the cache and the request has a place in a batch; the "
        "first token comes with the hand-over.",
        "A hand-over leaves layer by layer while prefill computes; what is left when prefill ends counts as transfer.",
        "Links share their rate fairly among transfers; loss and other traffic limit it, packets are not simulated.",
        "Service times are those of the profiles, without variance of their own.",
    ]
    profiles = {each.profile.name: each.profile for each in scenario.deployment.clusters}
    for profile in profiles.values():
        found.append(f"Profile {profile.name}: {profile.source}.")
        found += [f"Inferred in {profile.name}, not measured: {what} ({how})." for what, how in profile.inferred]
    return found


def _settings(settings: tuple[tuple[str, float], ...]) -> str:
    return f" ({', '.join(f'{name} {number(value)}' for name, value in settings)})" if settings else ""


def _duration(scenario: Scenario) -> str:
    return "the whole workload" if scenario.duration_s is None else f"arrivals until {scenario.duration_s:g} s"


def _fault(fault: LinkFault | NodeFault) -> str:
    when = f"from {fault.from_s:g} to {fault.until_s:g} s"
    if isinstance(fault, LinkFault):
        return f"link {fault.source} → {fault.target} carries {percent(fault.share)} of its rate {when}"
    return f"{fault.instances} {fault.role} instances of {fault.cluster} are gone {when}"
