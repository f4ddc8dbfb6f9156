"""`kvstore inspect`."""

from __future__ import annotations

import json
import stat
import sys
from typing import TYPE_CHECKING, Any

from kvstore.cli.printing import print_table, printable
from kvstore.errors import RecordError, SsdDirectoryError
from kvstore.record import StreamedRecord, read_record_stream
from kvstore.record.stream import STREAM_BYTES_MAX
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PIECES_SHOWN = 24


def run_inspect(files: Sequence[Path], *, as_json: bool, all_pieces: bool) -> int:
    """Verify and print each file; the exit status."""
    documents: list[dict[str, Any]] = []
    failed = False
    for file in files:
        if file.is_dir():
            failed |= not _inspect_directory(file, documents, as_json=as_json)
            continue
        try:
            data = _read(file)
            record = read_record_stream(data)
        except (OSError, RecordError) as error:
            failed = True
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            reason = printable(" ".join(reason.split()))
            print(f"kvstore inspect: {file}: {reason}", file=sys.stderr)
            documents.append({"file": str(file), "error": reason, "kind": type(error).__name__})
            continue
        document = {"file": str(file), "size_bytes": len(data), **describe(record)}
        documents.append(document)
        if not as_json:
            _print(document, None if all_pieces else PIECES_SHOWN)
    if as_json:
        print(json.dumps(documents, indent=2))
    return 1 if failed else 0


def _inspect_directory(path: Path, documents: list[dict[str, Any]], *, as_json: bool) -> bool:
    """Show a directory of an SSD tier; whether it is one."""
    from kvstore.cli.ssd_directory import describe_directory, print_directory

    try:
        document = describe_directory(path)
    except SsdDirectoryError as error:
        reason = printable(" ".join(str(error).split())).removeprefix(f"{path} ")
        print(f"kvstore inspect: {path}: {reason}", file=sys.stderr)
        documents.append({"directory": str(path), "error": reason, "kind": type(error).__name__})
        return False
    documents.append(document)
    if not as_json:
        print_directory(document)
    return True


def _read(file: Path) -> bytes:
    # Opening a pipe would wait for a writer, and a device need not end.
    if not stat.S_ISREG(file.stat().st_mode):
        raise RecordError("this is no regular file; give a file that holds one record")
    with file.open("rb") as opened:
        return opened.read(STREAM_BYTES_MAX + 1)


def held_tokens(record: StreamedRecord) -> list[int] | None:
    """How many tokens each layer of a sparse record holds; None for others."""
    if record.coverage is None:
        return None
    size = len(record.coverage) // len(record.fields.layers)
    masks = (record.coverage[start : start + size] for start in range(0, len(record.coverage), size))
    return [int.from_bytes(mask, "little").bit_count() for mask in masks]


def describe(record: StreamedRecord) -> dict[str, Any]:
    """A verified record as plain values."""
    fields, header = record.fields, record.header
    return {
        "format_version": int(record.batch.schema.metadata[b"kvstore.version"]),
        "model": fields.model,
        "fingerprint": fields.fingerprint.hex(),
        "group": fields.group,
        "rule": fields.rule,
        "layers": list(fields.layers),
        "span": fields.span_index,
        "units": {"start": fields.unit_start, "stop": fields.unit_stop, "count": fields.unit_count},
        "block_tokens": fields.block_tokens,
        "capacity_tokens": fields.capacity_tokens,
        "codecs": fields.codecs,
        "coverage": fields.coverage,
        "held_tokens": held_tokens(record),
        "key": header.key.hex(),
        "parent": header.parent.hex(),
        "grid": header.grid.hex(),
        "end_tokens": header.end_tokens,
        "valid_tokens": header.valid_tokens,
        "cost_us": header.cost_us,
        "schema_bytes": record.schema_bytes,
        "header_bytes": record.header_bytes,
        "tensors": [
            {
                "name": column.name,
                "dtype": column.dtype.label,
                "shape": list(column.shape),
                "has_tokens": column.has_tokens,
                "layer_bytes": column.layer_bytes,
                "segments": [vars(segment) for segment in column.segments],
            }
            for column in record.columns
        ],
        "pieces": [
            {
                "layer": piece.layer,
                "tensor": piece.tensor,
                "segment": piece.segment,
                "unit": piece.unit,
                "rows": piece.rows,
                "offset": piece.offset,
                "size_bytes": piece.size_bytes,
                "crc32c": f"{piece.checksum:08x}",
            }
            for piece in record.pieces
        ],
    }


def _held(document: dict[str, Any]) -> str:
    if document["held_tokens"] is None:
        return ""
    return f" (by layer {', '.join(map(str, document['held_tokens']))} of {document['valid_tokens']})"


def _print(document: dict[str, Any], pieces_shown: int | None) -> None:
    units = document["units"]
    summary = {
        "file": f"{document['file']}, {format_bytes(document['size_bytes'])}, undamaged",
        "format version": document["format_version"],
        "model": f"{document['model']}, fingerprint {document['fingerprint']}",
        "group": f"{document['group']} ({document['rule']} rule), span {document['span']}",
        "layers": ", ".join(map(str, document["layers"])),
        "shard units": f"{units['start']} to {units['stop']} of {units['count']}",
        "tokens": _tokens(document),
        "key": document["key"],
        "parent": document["parent"],
        "grid": document["grid"],
        "cost": f"{document['cost_us'] / 1e6:.6f} s of prefill" if document["cost_us"] else "unknown",
        "codecs, coverage": f"{document['codecs']}, {document['coverage']}" + _held(document),
        "schema, header": f"{document['schema_bytes']} and {document['header_bytes']} bytes",
    }
    print_table("record", ("field", "value"), [(name, str(value)) for name, value in summary.items()])
    print_table(
        "tensors of each layer",
        ("name", "type", "shape", "segments (units of all, rows per unit)", "bytes"),
        [
            (
                tensor["name"],
                tensor["dtype"],
                f"{tensor['shape']} [rows, {'tokens, ' if tensor['has_tokens'] else ''}*inner]",
                "; ".join(
                    f"{s['name']} {s['start']} to {s['stop']} of {s['units']}, {s['unit_rows']}"
                    for s in tensor["segments"]
                ),
                str(tensor["layer_bytes"]),
            )
            for tensor in document["tensors"]
        ],
    )
    pieces = document["pieces"]
    shown = pieces[:pieces_shown]
    columns = ("layer", "tensor", "segment", "unit", "rows", "offset", "size_bytes", "crc32c")
    print_table(
        f"{len(pieces)} pieces, all checksums hold",
        columns,
        [tuple(str(piece[column]) for column in columns) for piece in shown],
    )
    if len(shown) < len(pieces):
        print(f"{len(pieces) - len(shown)} more; --pieces shows all")


def _tokens(document: dict[str, Any]) -> str:
    if not document["capacity_tokens"]:
        return f"the state after {document['end_tokens']}"
    return f"{document['valid_tokens']} of room for {document['capacity_tokens']}, ending at {document['end_tokens']}"
