"""Records as arrays: what goes to another node or comes from it, without an object for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.pool.rows import COST_US, DIGEST, RecordNames

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvstore.pool.path import RecordName
    from kvstore.pool.rows import Rows
    from kvstore.record import RecordHeader, RecordLayout

    Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RecordArrays:
    """What records of one path are, one a row. Immutable.

    Attributes:
        names: node in the path, group, span and units.
        layouts: those that occur.
        layout_numbers: which of them each record has, `[n]`.
        end_tokens: length of each record's prefix, `[n]`.
        valid_tokens: tokens that each record really holds, `[n]`.
        digests: of the chunk grids that occur.
        digest_numbers: which of them each record has, `[n]`.
        costs_us: microseconds of prefill that each record saves, `[n]`; 0 where that is not known yet.
    """

    names: RecordNames
    layouts: list[RecordLayout]
    layout_numbers: Numbers
    end_tokens: Numbers
    valid_tokens: Numbers
    digests: list[bytes]
    digest_numbers: Numbers
    costs_us: npt.NDArray[np.uint64]

    @classmethod
    def of_rows(cls, rows: Rows) -> RecordArrays:
        """Of a table of the native index."""
        layouts, numbers = rows.classes
        digest_numbers = rows.table[:, DIGEST].astype(np.int64)
        costs_us = rows.table[:, COST_US]
        return cls(
            rows.record_names, layouts, numbers, rows.end_tokens, rows.valid_tokens, rows.digests, digest_numbers,
            costs_us,
        )  # fmt: skip

    @classmethod
    def of(cls, records: Iterable[tuple[RecordName, RecordLayout, RecordHeader]]) -> RecordArrays:
        """Of records one by one."""
        names, layouts, headers = tuple(zip(*records, strict=True)) or ((), (), ())
        known_layouts: dict[RecordLayout, int] = {}
        known_digests: dict[bytes, int] = {}
        return cls(
            RecordNames.of(names),
            list(dict.fromkeys(layouts)),
            np.array([known_layouts.setdefault(layout, len(known_layouts)) for layout in layouts], np.int64),
            np.array([header.end_tokens for header in headers], np.int64),
            np.array([header.valid_tokens for header in headers], np.int64),
            list(dict.fromkeys(header.grid for header in headers)),
            np.array([known_digests.setdefault(header.grid, len(known_digests)) for header in headers], np.int64),
            np.array([header.cost_us for header in headers], np.uint64),
        )

    def __len__(self) -> int:
        return len(self.names)

    def taken(self, order: Numbers) -> RecordArrays:
        """Those of these numbers, in this order."""
        return RecordArrays(
            RecordNames(self.names.table[order]),
            self.layouts,
            self.layout_numbers[order],
            self.end_tokens[order],
            self.valid_tokens[order],
            self.digests,
            self.digest_numbers[order],
            self.costs_us[order],
        )

    def layout(self, number: int) -> RecordLayout:
        return self.layouts[int(self.layout_numbers[number])]

    def by_layout(self, values: Iterable[int]) -> Numbers:
        """One value for each of `layouts`, spread over the records."""
        return np.array(list(values), np.int64)[self.layout_numbers]
