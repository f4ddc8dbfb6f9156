"""Transfer: the records of one resume point move to another node, whole or not at all (docs/protocol.md)."""

from kvstore.transfer.endpoint import Endpoint
from kvstore.transfer.fetcher import Fetcher
from kvstore.transfer.frames import TransferId
from kvstore.transfer.inbox import InboxStatistics
from kvstore.transfer.query import RemoteCandidate
from kvstore.transfer.remote import FetchReport, RemoteMatch
from kvstore.transfer.report import PathReport, TransferObserver, TransferReport
from kvstore.transfer.sender import Sender, SenderStatistics, send_lease, send_writer
from kvstore.transfer.serving import ServingStatistics
from kvstore.transfer.settings import TransferSettings
from kvstore.transfer.snapshots import OutgoingSnapshot, TransferState
from kvstore.transfer.source import LeaseSource, Source, SourceListener, SourceRecord, WriterSource
from kvstore.transfer.status import IncomingStatus
from kvstore.transfer.telemetry import LinkSnapshot

__all__ = [
    "Endpoint",
    "FetchReport",
    "Fetcher",
    "InboxStatistics",
    "IncomingStatus",
    "LeaseSource",
    "LinkSnapshot",
    "OutgoingSnapshot",
    "PathReport",
    "RemoteCandidate",
    "RemoteMatch",
    "Sender",
    "SenderStatistics",
    "ServingStatistics",
    "Source",
    "SourceListener",
    "SourceRecord",
    "TransferId",
    "TransferObserver",
    "TransferReport",
    "TransferSettings",
    "TransferState",
    "WriterSource",
    "send_lease",
    "send_writer",
]
