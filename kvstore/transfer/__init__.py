"""Transfer: the records of one resume point move to another node, whole or not at all (docs/protocol.md)."""

from kvstore.transfer.endpoint import Endpoint
from kvstore.transfer.frames import TransferId
from kvstore.transfer.inbox import InboxStatistics
from kvstore.transfer.report import PathReport, TransferObserver, TransferReport
from kvstore.transfer.sender import Sender, SenderStatistics, send_lease, send_writer
from kvstore.transfer.settings import TransferSettings
from kvstore.transfer.snapshots import OutgoingSnapshot, TransferState
from kvstore.transfer.source import LeaseSource, Source, SourceListener, SourceRecord, WriterSource
from kvstore.transfer.status import IncomingStatus
from kvstore.transfer.telemetry import LinkSnapshot

__all__ = [
    "Endpoint",
    "InboxStatistics",
    "IncomingStatus",
    "LeaseSource",
    "LinkSnapshot",
    "OutgoingSnapshot",
    "PathReport",
    "Sender",
    "SenderStatistics",
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
