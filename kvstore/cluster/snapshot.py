"""What a node is doing at one moment, as values: the metrics and the status page are made of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvstore.transfer import ServingStatistics

if TYPE_CHECKING:
    from kvstore.metrics import StoreMetrics
    from kvstore.transfer import InboxStatistics, IncomingStatus, LinkSnapshot, SenderStatistics


@dataclass(frozen=True)
class ReceiverSnapshot:
    """One address that the node listens on.

    Attributes:
        address: with the real port.
        connections: open now.
        transfers: those that hold a reservation.
        statistics: counters.
        last_refused: the last peer that was refused, and why.
        fetches: transfers that peers fetch from here now.
        serving: counters of what was asked and fetched.
    """

    address: str
    connections: int
    transfers: tuple[IncomingStatus, ...]
    statistics: InboxStatistics
    last_refused: tuple[str, str] | None
    fetches: int = 0
    serving: ServingStatistics = field(default_factory=ServingStatistics)


@dataclass(frozen=True)
class NodeSnapshot:
    """All of it.

    Attributes:
        state: `starting`, `ready`, `draining` or `closed`.
        version: of the library.
        pid, started_at_s, uptime_s: of the process; the start in seconds since 1970.
        model, weights, fingerprint, block_tokens: of the spec; None until it was read.
        store: counters and budget; None until there is a store.
        attached_processes: engines' processes on the pool.
        receivers: by address.
        sending: transfers that leave now.
        sent: counters of what left; None if nothing did.
        links: how the links to the peers that were sent to are doing.
    """

    state: str
    version: str
    pid: int
    started_at_s: float
    uptime_s: float
    model: str | None = None
    weights: str | None = None
    fingerprint: str | None = None
    block_tokens: int | None = None
    store: StoreMetrics | None = None
    attached_processes: int = 0
    receivers: tuple[ReceiverSnapshot, ...] = ()
    sending: int = 0
    sent: SenderStatistics | None = None
    links: tuple[LinkSnapshot, ...] = ()

    def document(self) -> dict[str, Any]:
        """For JSON. Salts are secrets of tenants: they are counted, not named."""
        pool = None
        if self.store is not None:
            pool = {**asdict(self.store.pool), "salts": len(self.store.pool.bytes_by_salt)}
            del pool["bytes_by_salt"]
        return {
            "state": self.state,
            "version": self.version,
            "pid": self.pid,
            "started_at_s": round(self.started_at_s, 3),
            "uptime_s": round(self.uptime_s, 3),
            "spec": {
                "model": self.model,
                "weights": self.weights,
                "fingerprint": self.fingerprint,
                "block_tokens": self.block_tokens,
            },
            "pool": pool,
            "attached_processes": self.attached_processes,
            "serving": [_serving_document(receiver) for receiver in self.receivers],
            "receiving": [_receiver_document(receiver) for receiver in self.receivers],
            "sending": {"transfers": self.sending, **(vars(self.sent) if self.sent is not None else {})},
            "links": [vars(link) for link in self.links],
        }


def _serving_document(receiver: ReceiverSnapshot) -> dict[str, Any]:
    return {"address": receiver.address, "transfers": receiver.fetches, "statistics": vars(receiver.serving)}


def _receiver_document(receiver: ReceiverSnapshot) -> dict[str, Any]:
    refused = receiver.last_refused
    return {
        "address": receiver.address,
        "connections": receiver.connections,
        "transfers": [{**vars(status), "transfer": str(status.transfer)} for status in receiver.transfers],
        "statistics": vars(receiver.statistics),
        "last_refused": None if refused is None else {"peer": refused[0], "reason": refused[1]},
    }
