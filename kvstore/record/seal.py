"""Framing records whose pieces and checksums are in place, and checking many that were framed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import frame_records, intact_records
from kvstore.record.header import FIELD_WIDTHS
from kvstore.record.threads import copy_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.record.header import RecordHeader
    from kvstore.record.layout import RecordLayout

COST_US_MAX = 10 ** FIELD_WIDTHS["kvstore.cost_us"] - 1
"""The largest cost that its field takes."""


def seal_records(
    layout: RecordLayout,
    addresses: npt.NDArray[np.uint64],
    headers: Sequence[RecordHeader],
    costs_us: Sequence[int],
) -> None:
    """Write the framing of records of one class in one native call. Any thread.

    Args:
        addresses: where each record lies, `[n]`; the caller keeps the memory alive.
        headers: of each record; their own cost is not looked at.
        costs_us: microseconds of prefill that each record saves.
    """
    seal_rows(layout, addresses, *_packed_fields(headers, costs_us))


def which_intact(
    layout: RecordLayout, addresses: npt.NDArray[np.uint64], headers: Sequence[RecordHeader]
) -> npt.NDArray[np.bool_]:
    """Whether `Record.verify` would find each of these headers, for records of one class in one native call, `[n]`.

    Args:
        addresses: where each record lies, `[n]`; the caller keeps the memory alive.
        headers: what each record must say, its cost included.
    """
    return which_intact_rows(layout, addresses, *_packed_fields(headers, [header.cost_us for header in headers]))


def which_intact_rows(
    layout: RecordLayout,
    addresses: npt.NDArray[np.uint64],
    digests: bytes | memoryview,
    numbers: npt.NDArray[np.uint64],
) -> npt.NDArray[np.bool_]:
    """As `which_intact`, from arrays; see `seal_rows`."""
    record_class, gaps = layout.framing
    threads = copy_threads(layout.record_bytes * len(addresses))
    return intact_records(
        layout.header_template, record_class, gaps, layout.piece_ranges, addresses, digests, numbers, threads=threads
    )


def _packed_fields(headers: Sequence[RecordHeader], costs_us: Sequence[int]) -> tuple[bytes, npt.NDArray[np.uint64]]:
    """Digests and numbers as native calls take them."""
    digests = b"".join([part for header in headers for part in (header.key, header.parent, header.grid)])
    numbers = np.array(
        [
            (header.end_tokens, header.valid_tokens, min(cost_us, COST_US_MAX))
            for header, cost_us in zip(headers, costs_us, strict=True)
        ],
        np.uint64,
    ).reshape(-1, 3)
    return digests, numbers


def seal_rows(
    layout: RecordLayout,
    addresses: npt.NDArray[np.uint64],
    digests: bytes | memoryview,
    numbers: npt.NDArray[np.uint64],
) -> None:
    """As `seal_records`, from arrays.

    Args:
        digests: key, parent and chunk grid of each record, `[n, 96]`.
        numbers: end, valid tokens and cost of each record, `[n, 3]`.
    """
    record_class, gaps = layout.framing
    frame_records(layout.header_template, record_class, gaps, addresses, digests, numbers)
