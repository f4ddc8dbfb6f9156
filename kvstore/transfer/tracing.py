"""A span per transfer, where the program has set OpenTelemetry up."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.report import TransferReport

LOG = logging.getLogger("kvstore.transfer")
TRACER_NAME = "kvstore.transfer"


class TransferSpan(Protocol):
    """What a transfer tells of itself."""

    def committed(self, report: TransferReport) -> None:
        """It has ended by a commit. Ends the span."""

    def failed(self, error: BaseException) -> None:
        """It has ended otherwise. Ends the span."""


class NoSpan:
    """Where nobody traces."""

    def committed(self, report: TransferReport) -> None:
        return

    def failed(self, error: BaseException) -> None:
        return


class OpenTelemetrySpan:
    """A span from the call of `send` to the end of the transfer, a child of the caller's span."""

    def __init__(self, trace: Any, transfer: TransferId, peer_address: str, offered_bytes: int, tokens: int) -> None:
        self._status, self._error = trace.Status, trace.StatusCode.ERROR
        attributes = {
            "kvstore.transfer.id": str(transfer),
            "kvstore.transfer.offered_bytes": offered_bytes,
            "kvstore.transfer.tokens": tokens,
            "server.address": peer_address,
        }
        self._span = trace.get_tracer(TRACER_NAME).start_span(
            "kvstore.transfer", kind=trace.SpanKind.PRODUCER, attributes=attributes
        )

    def committed(self, report: TransferReport) -> None:
        path = report.path
        self._span.set_attributes(
            {
                "kvstore.transfer.outcome": "committed",
                "kvstore.transfer.bytes": report.total_bytes,
                "kvstore.transfer.pieces": report.pieces,
                "kvstore.transfer.pieces_skipped": report.pieces_skipped,
                "kvstore.transfer.pieces_again": report.pieces_again,
                "kvstore.transfer.reconnects": report.reconnects,
                "kvstore.transfer.exposed_s": report.exposed_s,
                "kvstore.transfer.connections": path.connections,
                "kvstore.transfer.congestion_control": ",".join(path.congestion_control),
                "kvstore.transfer.path": path.why,
            }
        )
        self._span.end()

    def failed(self, error: BaseException) -> None:
        self._span.set_attribute("kvstore.transfer.outcome", type(error).__name__)
        self._span.record_exception(error)
        self._span.set_status(self._status(self._error, str(error)))
        self._span.end()


class GuardedSpan:
    """A span whose faults do not concern the transfer: what the program has set up runs inside of it."""

    def __init__(self, span: TransferSpan) -> None:
        self._span = span

    def committed(self, report: TransferReport) -> None:
        try:
            self._span.committed(report)
        except Exception:
            LOG.exception("transfer %s was committed, and its span could not be ended", report.transfer)

    def failed(self, error: BaseException) -> None:
        try:
            self._span.failed(error)
        except Exception:
            LOG.exception("a transfer has failed, and its span could not be ended")


def begin_span(transfer: TransferId, peer_address: str, offered_bytes: int, tokens: int) -> TransferSpan:
    """A span in the caller's context, or nothing where the program does not use OpenTelemetry.

    A program that has configured a tracer provider has imported the package; this library never does.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return NoSpan()
    try:
        return GuardedSpan(OpenTelemetrySpan(trace, transfer, peer_address, offered_bytes, tokens))
    except Exception:
        LOG.exception("transfer %s has no span: it could not be begun", transfer)
        return NoSpan()
