"""A request on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.schedule.policies.policy import Route
    from kvstore.schedule.policies.snapshot import CachedPrefix
    from kvstore.simulate.links import Flow
    from kvstore.simulate.site import Site
    from kvstore.workload.request import Request

QUEUE, LOAD, PREFIX, PREFILL, TRANSFER, DECODE_WAIT = range(6)
"""Places in `kvstore.simulate.result.PARTS`."""


class Job:
    """A request that has arrived and not ended.

    Attributes:
        attempt: raised when an instance that was at it fails, so that what was planned for it is seen to be overtaken.
        parts: seconds of `PARTS` so far.
        since_s: until when they account for the time; the rest belongs to what comes to an end next.
        resume_tokens: the length that prefill begins at.
        prefix: what the prefix is taken from, and `prefix_site` where it is.
        present_tokens: attention that the decoding cluster has, which need not cross.
        stores: of the prefilling cluster's cache when this was routed; whether to look again before prefill.
        service_s: how long prefill takes, as far as known when it was queued.
        end_s: when prefill ends.
        first_s: when the first token came.
    """

    __slots__ = (
        "arrival_s",
        "attempt",
        "decode",
        "end_s",
        "first_s",
        "flow",
        "handover_bytes",
        "parts",
        "prefill",
        "prefix",
        "prefix_bytes",
        "prefix_site",
        "present_tokens",
        "request",
        "resume_tokens",
        "route",
        "service_s",
        "since_s",
        "stores",
    )

    def __init__(self, request: Request, now_s: float) -> None:
        self.request = request
        self.arrival_s = now_s
        self.since_s = now_s
        self.attempt = 0
        self.parts = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        self.route: Route
        self.prefill: Site
        self.decode: Site
        self.prefix: CachedPrefix
        self.prefix_site: Site
        self.flow: Flow | None = None
        self.resume_tokens = 0
        self.present_tokens = 0
        self.stores = 0
        self.service_s = 0.0
        self.end_s = 0.0
        self.first_s = 0.0
        self.prefix_bytes = 0.0
        self.handover_bytes = 0.0

    def passed(self, part: int, now_s: float) -> None:
        """What has passed since the last time belongs to this part."""
        self.parts[part] += now_s - self.since_s
        self.since_s = now_s
