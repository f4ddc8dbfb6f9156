"""Records: the unit of placement, an Arrow record batch in one slot (docs/format.md)."""

from kvstore.record.columns import SegmentUnits, TensorColumn
from kvstore.record.header import RecordHeader
from kvstore.record.layout import Piece, RecordLayout, largest_slot_bytes, record_layout, slot_sizes_bytes
from kvstore.record.record import Record
from kvstore.record.seal import seal_records, seal_rows, which_intact
from kvstore.record.stream import StreamedPiece, StreamedRecord, read_record_stream, write_record_stream

__all__ = [
    "Piece",
    "Record",
    "RecordHeader",
    "RecordLayout",
    "SegmentUnits",
    "StreamedPiece",
    "StreamedRecord",
    "TensorColumn",
    "largest_slot_bytes",
    "read_record_stream",
    "record_layout",
    "seal_records",
    "seal_rows",
    "slot_sizes_bytes",
    "which_intact",
    "write_record_stream",
]
