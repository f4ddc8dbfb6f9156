"""What policies are shown, and how old it is."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

from kvstore.schedule.policies.snapshot import LinkState, Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.prefill_service import PrefillServiceModel
    from kvstore.simulate.events import Events
    from kvstore.simulate.links import Line
    from kvstore.simulate.site import Site

UTILISATION_MEMORY_S = 5.0
"""Over which the used share of a link is averaged, weighing what is older less."""


class Telemetry:
    """Snapshots: queues as they are at the moment, links and rates as they were measured last. Not thread-safe.

    A router knows queues without telemetry: it has filled them, and hears of every end.
    """

    def __init__(
        self,
        events: Events,
        sites: Mapping[str, Site],
        lines: Mapping[tuple[str, str], Line],
        prefill_service: PrefillServiceModel,
    ) -> None:
        self._events = events
        self._prefill_service = prefill_service
        self._sites = sites
        self._lines = lines
        self._links: dict[tuple[str, str], LinkState] = {}
        self._delivered_bytes = dict.fromkeys(lines, 0.0)
        self._measured_s = 0.0

    def snapshot(self) -> Snapshot:
        """What a policy is shown at this moment."""
        now_s = self._events.now_s
        age_s = now_s - self._measured_s
        links = self._links
        if age_s > 0:
            links = {
                pair: LinkState(
                    each.source,
                    each.target,
                    each.bytes_per_s,
                    each.queued_bytes,
                    each.used_share,
                    each.round_trip_s,
                    each.retransmitted_share,
                    age_s,
                    each.coming_bytes,
                )
                for pair, each in links.items()
            }
        states = {name: site.state() for name, site in self._sites.items()}
        return Snapshot(now_s, states, links, self._prefill_service)

    def measure(self) -> float:
        """An interval ends.

        Returns:
            Seconds since the last one.
        """
        now_s = self._events.now_s
        passed_s = now_s - self._measured_s
        self._measured_s = now_s
        for site in self._sites.values():
            site.measure(passed_s)
        weight = 1.0 - exp(-passed_s / UTILISATION_MEMORY_S)
        states = {}
        for pair, line in self._lines.items():
            delivered_bytes = line.delivered(now_s)
            could_bytes = line.delivers_bytes_per_s * passed_s
            before = self._links.get(pair)
            used_share = 0.0 if before is None else before.used_share
            if could_bytes > 0:
                share = min((delivered_bytes - self._delivered_bytes[pair]) / could_bytes, 1.0)
                used_share += weight * (share - used_share)
            self._delivered_bytes[pair] = delivered_bytes
            states[pair] = LinkState(
                pair[0],
                pair[1],
                line.delivers_bytes_per_s,
                line.queued_bytes(now_s),
                used_share,
                line.round_trip_s,
                line.link.loss,
                coming_bytes=line.coming_bytes(now_s),
            )
        self._links = states
        return passed_s
