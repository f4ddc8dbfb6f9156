"""Snapshots of made-up clusters, for tests of policies."""

from __future__ import annotations

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster
from kvstore.schedule.policies.snapshot import ClusterState, LinkState, Snapshot

PROFILE = Profile(
    name="test",
    source="made up",
    prefill=MeasuredCurve((1024.0, 8192.0, 32768.0, 131072.0), (0.44, 0.72, 1.84, 7.40)),
    kv=KvSize(state_bytes=1e8, token_bytes=2e4),
    decode_step=PolynomialCurve((0.02, 0.00025)),
    decode_batch_max=20,
    accelerators=8,
    tokens_max=131072,
)


def cluster_state(
    name: str = "pd",
    *,
    prefill: int = 3,
    decode: int = 5,
    waiting: float = 0,
    wait_s: float = 0.0,
    running: int = 0,
    decode_waiting: int = 0,
    decode_coming: int = 0,
    served_per_s: float = 0.0,
    latency_s: float = 0.0,
    convertible: bool = False,
    conversion_s: float = 60.0,
) -> ClusterState:
    return ClusterState(
        cluster=Cluster(name, PROFILE, prefill, decode, convertible=convertible, conversion_s=conversion_s),
        prefill_instances=prefill,
        prefill_waiting=waiting,  # type: ignore[arg-type]
        prefill_wait_s=wait_s,
        decode_instances=decode,
        decode_running=running,
        decode_waiting=decode_waiting,
        tpot_s=PROFILE.decode_step(max(running / max(decode, 1), 1.0)),
        prefills_per_s=served_per_s,
        prefill_latency_s=latency_s,
        decode_coming=decode_coming,
    )


def snapshot(now_s: float, *states: ClusterState, used_share: float = 0.0) -> Snapshot:
    names = [state.cluster.name for state in states]
    links = {
        (source, target): LinkState(source, target, 12.5e9, 0.0, used_share, 0.001)
        for source in names
        for target in names
        if source != target
    }
    return Snapshot(now_s, {state.cluster.name: state for state in states}, links)
