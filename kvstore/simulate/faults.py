"""Faults of a scenario: links that carry less for a while, instances that are gone for a while."""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING

from kvstore.errors import SimulationError
from kvstore.scenario import LinkFault
from kvstore.simulate.result import Happening

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from kvstore.scenario import NodeFault, Scenario
    from kvstore.simulate.events import Events
    from kvstore.simulate.job import Job
    from kvstore.simulate.links import Links
    from kvstore.simulate.site import Site


def check_faults(scenario: Scenario) -> None:
    """Whether all that faults name exists.

    Raises:
        SimulationError: an unknown cluster or link, a share outside 0 to 1, times that do not ascend.
    """
    for fault in scenario.faults:
        if not (isfinite(fault.from_s) and 0 <= fault.from_s < fault.until_s):
            raise SimulationError(f"{fault}: from_s must not be negative, and until_s come after it")
        if isinstance(fault, LinkFault):
            if scenario.deployment.link(fault.source, fault.target) is None:
                raise SimulationError(f"{fault}: there is no link from {fault.source!r} to {fault.target!r}")
            if not 0 <= fault.share <= 1:
                raise SimulationError(f"{fault}: the share that is left must be in [0, 1]")
        else:
            scenario.deployment.cluster(fault.cluster)
            if fault.instances < 1:
                raise SimulationError(f"{fault}: at least one instance fails")


class Faults:
    """Lets the faults of a scenario come and go. Not thread-safe.

    Faults of one link multiply. Instances that fail are picked at random by the scenario's seed among those that work;
    as many come back when the fault ends, empty.

    Args:
        prefill_lost, decode_lost: called with each job that a failed instance was at.
        prefill_changed: called when instances that prefill have gone or come back, and those jobs were told of.
        link_back: called when a link's fault has ended.
    """

    def __init__(
        self,
        scenario: Scenario,
        events: Events,
        links: Links,
        sites: Mapping[str, Site],
        random: np.random.Generator,
        *,
        prefill_lost: Callable[[Job], None],
        decode_lost: Callable[[Job], None],
        prefill_changed: Callable[[], None],
        link_back: Callable[[], None],
    ) -> None:
        self._events = events
        self._links = links
        self._sites = sites
        self._random = random
        self._prefill_lost = prefill_lost
        self._decode_lost = decode_lost
        self._prefill_changed = prefill_changed
        self._link_back = link_back
        self._active: list[LinkFault] = []
        self.happenings: list[Happening] = []
        for fault in scenario.faults:
            # Its beginning alone keeps no simulation going; its end does, since transfers may wait for it.
            events.watch(fault.from_s, self._begin_link if isinstance(fault, LinkFault) else self._begin_node, fault)

    def _begin_link(self, fault: LinkFault) -> None:
        self._active.append(fault)
        self._set(fault)
        self._note(f"{fault.source} to {fault.target}", f"carries {fault.share:.0%}")
        if fault.until_s < inf:
            self._events.at(fault.until_s, self._end_link, fault)

    def _end_link(self, fault: LinkFault) -> None:
        self._active.remove(fault)
        self._set(fault)
        self._note(f"{fault.source} to {fault.target}", "fault ends")
        self._link_back()

    def _set(self, fault: LinkFault) -> None:
        share = 1.0
        for each in self._active:
            if (each.source, each.target) == (fault.source, fault.target):
                share *= each.share
        self._links.set_share(fault.source, fault.target, share)

    def _begin_node(self, fault: NodeFault) -> None:
        site = self._sites[fault.cluster]
        if fault.role == "prefill":
            before = len(site.prefill.busy) + site.prefill.idle
            lost = site.prefill.fail(self._pick, fault.instances)
            gone = before - len(site.prefill.busy) - site.prefill.idle
        else:
            before = site.decode.present
            lost = site.decode.fail(self._pick, fault.instances)
            gone = before - site.decode.present
        self._note(fault.cluster, f"{gone} {fault.role} instances fail with {len(lost)} requests")
        for job in lost:
            (self._prefill_lost if fault.role == "prefill" else self._decode_lost)(job)
        if fault.role == "prefill":
            self._prefill_changed()
        if fault.until_s < inf and gone:
            self._events.at(fault.until_s, self._end_node, (fault, gone))

    def _end_node(self, which: tuple[NodeFault, int]) -> None:
        fault, instances = which
        site = self._sites[fault.cluster]
        (site.prefill if fault.role == "prefill" else site.decode).add(instances)
        self._note(fault.cluster, f"{instances} {fault.role} instances are back")
        if fault.role == "prefill":
            self._prefill_changed()

    def _pick(self, of: int, count: int) -> list[int]:
        return sorted(self._random.choice(of, count, replace=False).tolist()) if count else []

    def _note(self, where: str, text: str) -> None:
        self.happenings.append(Happening(self._events.now_s, "fault", where, text))
