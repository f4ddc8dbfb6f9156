"""What a policy is shown: how clusters and links are doing, and what each cluster has of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.schedule.prefill_service import WHOLE, PrefillServiceModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Cluster


@dataclass(frozen=True, slots=True)
class ClusterState:
    """How a cluster is doing.

    Attributes:
        cluster: what it is.
        prefill_instances: that work at the moment; fewer than configured after failures and conversions.
        prefill_waiting: prompts that wait for an instance.
        prefill_wait_s: until an instance is free for a prompt that comes last, as the prompts before it are estimated.
        decode_instances: that work at the moment.
        decode_running: requests that are being decoded.
        decode_waiting: requests whose cache is there, and that wait for a place in a batch.
        tpot_s: time per output token that the running requests get.
        age_s: how old this is.
        prefills_per_s: that ended, per second since the snapshot before; 0 where nobody measures it.
        prefill_latency_s: mean of those, from asking for an instance to the last token.
        decode_coming: requests that are to decode here, and whose prefill or hand-over has not ended.
    """

    cluster: Cluster
    prefill_instances: int
    prefill_waiting: int
    prefill_wait_s: float
    decode_instances: int
    decode_running: int
    decode_waiting: int
    tpot_s: float
    age_s: float = 0.0
    prefills_per_s: float = 0.0
    prefill_latency_s: float = 0.0
    decode_coming: int = 0


@dataclass(frozen=True, slots=True)
class LinkState:
    """How one direction between two clusters is doing.

    Attributes:
        bytes_per_s: what it delivers while there is enough to send: measured, or configured where nothing was. 0 while
            it is down.
        queued_bytes: ready to leave and not yet delivered.
        used_share: of what it could carry over the last seconds, 0 to 1.
        round_trip_s: to the other end and back.
        retransmitted_share: bytes sent again, of all sent.
        age_s: how old this is.
        coming_bytes: that prefills under way have still to make for it.
    """

    source: str
    target: str
    bytes_per_s: float
    queued_bytes: float
    used_share: float
    round_trip_s: float
    retransmitted_share: float = 0.0
    age_s: float = 0.0
    coming_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything at one moment.

    Attributes:
        now_s: the moment, on the clock of whoever took it.
        clusters: by name.
        links: by source and target; a missing one does not exist.
        prefill_service: how prompts are prefilled.
    """

    now_s: float
    clusters: Mapping[str, ClusterState]
    links: Mapping[tuple[str, str], LinkState]
    prefill_service: PrefillServiceModel = WHOLE


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What one cluster has of a prompt.

    Attributes:
        resume_tokens: the deepest usable resume point: every group is there, states at exactly this length.
        attention_tokens: how far attention blocks reach; at least `resume_tokens`. Blocks beyond the resume point save
            no computing, and need not cross a link again.
        load_s: until it is in the memory of an instance, from the tier that it lies in.
        tier: the slowest tier that it would come from; empty where nothing is there.
    """

    resume_tokens: int = 0
    attention_tokens: int = 0
    load_s: float = 0.0
    tier: str = ""


NOTHING_CACHED = CachedPrefix()


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What is known of a request when it is routed.

    Attributes:
        prompt_tokens: all of them.
        output_tokens: expected, such as the mean of those that ended (`kvstore.schedule.policies.answers`).
        cached: what clusters have of it, by name; a missing one has nothing.
        allowed: clusters that may see it (privacy, residency); None for all.
    """

    prompt_tokens: int
    output_tokens: float
    cached: Mapping[str, CachedPrefix]
    allowed: frozenset[str] | None = None
