"""Conversions: instances that give up one role for the other, as a policy says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.simulate.result import Happening

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvstore.schedule.policies.convert import Conversion
    from kvstore.simulate.events import Events
    from kvstore.simulate.site import Site


class Conversions:
    """Carries conversions out: the instance ends what it is at, has no role for a while, and takes the other one.

    Args:
        prefill_changed: called when a cluster has one more instance that prefills.
    """

    def __init__(self, events: Events, sites: Mapping[str, Site], prefill_changed: Callable[[], None]) -> None:
        self._events = events
        self._sites = sites
        self._prefill_changed = prefill_changed
        self.happenings: list[Happening] = []

    def begin(self, conversion: Conversion) -> None:
        site = self._sites[conversion.cluster]
        self._note(conversion, "is to become")
        instances = site.prefill if conversion.source == "prefill" else site.decode
        instances.release(lambda: self._gone(conversion, site))

    def _gone(self, conversion: Conversion, site: Site) -> None:
        self._events.at(self._events.now_s + site.cluster.conversion_s, self._ended, conversion)

    def _ended(self, conversion: Conversion) -> None:
        site = self._sites[conversion.cluster]
        (site.prefill if conversion.target == "prefill" else site.decode).add(1)
        self._note(conversion, "has become")
        if conversion.target == "prefill":
            self._prefill_changed()

    def _note(self, conversion: Conversion, verb: str) -> None:
        text = f"a {conversion.source} instance {verb} one for {conversion.target}"
        self.happenings.append(Happening(self._events.now_s, "conversion", conversion.cluster, text))
