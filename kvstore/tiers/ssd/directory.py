"""One directory of an SSD tier: segments with records, and the journal that says which records exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore.abc.files import FileBatch, Files
    from kvstore.clock import Deadline
    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.rows import NodeRows, RecordRows


@dataclass(frozen=True)
class SegmentUsage:
    """One segment file.

    Attributes:
        number: which one; never used again.
        record_class: group, span, first unit, unit after the last of the records in it.
        size_bytes: of the file as far as it is in use: its head, records and, once sealed, the footer.
        is_sealed: nothing is added to it any more.
    """

    number: int
    record_class: tuple[int, int, int, int]
    size_bytes: int
    is_sealed: bool


class SsdDirectory:
    """The records of one model spec in one directory. It knows no index, and evicts nothing by itself.

    `append`, `forget`, `sync`, `remove_segment` and `rewrite_journal` are for one thread at a time; `read` and the
    properties for any.

    Attributes:
        recovered: what was there when it was opened: the nodes and records that the journal names and whose segments
            are there, without what `forget` named, each record once, contiguous from the root. Not verified.
    """

    recovered: tuple[NodeRows, RecordRows]

    @classmethod
    def open(cls, files: Files, spec: ModelSpec, *, capacity_bytes: int, is_read_only: bool = False) -> SsdDirectory:
        """Take the directory, or make an empty one of it, and recover what it holds.

        The directory exists. `files` becomes this object's to close. With `is_read_only` nothing in the directory is
        changed: no lock is taken, nothing is sealed, removed or made.

        Args:
            capacity_bytes: what it is meant to hold; decides how large a segment becomes. Nothing is refused by it.

        Raises:
            SsdDirectoryError: another process has it (the message names its pid), it is of another model or a newer
                format, it holds files of others, or it cannot be read. Nothing was changed.
        """
        raise NotImplementedError

    def append(
        self, nodes: NodeRows, records: RecordRows, addresses: npt.NDArray[np.uint64], deadline: Deadline
    ) -> RecordRows:
        """Write records and make them durable; the same rows with `place` and `metadata_crc32c` filled in.

        Rows of `forget` that wait go with it, and count before these records. Records may be there already: the newer
        ones count from then on.

        Args:
            nodes: the nodes of all records, and those between them and what was given before, parents before children.
            addresses: where each record's slot lies, `[m]`, aligned to `FILE_ALIGN_BYTES`, sealed; must stay as it is
                until this returns or raises, see `has_settled`.

        Raises:
            OSError: it could not be written; nothing of it counts. The directory remains usable where that may help
                (a full disk), else `trouble` says why nothing is written to it any more.
            DeadlineError: as `OSError`. What had not ended is named by `has_settled`.
            ValueError: the rows contradict each other or the spec. Nothing was written.
        """
        raise NotImplementedError

    def has_settled(self) -> bool:
        """Whether every write that a failed append had begun has ended. Until then its memory must not be given away."""
        raise NotImplementedError

    def read(self, places: npt.NDArray[np.uint64], addresses: npt.NDArray[np.uint64]) -> FileBatch:
        """Begin to read whole slots into memory, urgently.

        Args:
            places: `RecordRows.place` of each, `[m, 3]`.
            addresses: where each goes, `[m]`, aligned to `FILE_ALIGN_BYTES`.

        Raises:
            FileNotFoundError: there is no such segment. OSError: it cannot be opened.
        """
        raise NotImplementedError

    def forget(self, keys: Sequence[bytes], are_states: Sequence[bool]) -> None:
        """Records that were evicted on purpose shall not come back: a node's states, or its attention with all below it.

        Rows of the next `append` or `sync`; what is recovered before may still hold them.
        """
        raise NotImplementedError

    def sync(self, deadline: Deadline) -> None:
        """Write the rows of `forget` that wait. Raises as `append`; they wait on then."""
        raise NotImplementedError

    def segments(self) -> list[SegmentUsage]:
        """Every segment that is there, by number, those of which no record counts included."""
        raise NotImplementedError

    def remove_segment(self, number: int) -> None:
        """Remove a segment's file. Nobody reads it: the caller's duty. Its records no longer count, also after a crash.

        Raises:
            OSError: it cannot be removed.
        """
        raise NotImplementedError

    def rewrite_journal(self, nodes: NodeRows, records: RecordRows, deadline: Deadline) -> None:
        """Replace the journal by one that holds just these rows, all of them with places. A crash leaves one or the other.

        Rows of `forget` that wait are dropped: what they name is not among these.

        Raises:
            OSError, DeadlineError: the journal is the old one, as far as that could be read. As `append`.
        """
        raise NotImplementedError

    @property
    def trouble(self) -> str:
        """Why nothing is written any more, in a sentence; empty while it works."""
        raise NotImplementedError

    @property
    def journal_bytes(self) -> int:
        """Size of the journal's file."""
        raise NotImplementedError

    @property
    def journal_records(self) -> int:
        """Record and forget rows in the journal: with more than twice as many as records live, rewriting pays."""
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, dead records included."""
        raise NotImplementedError

    @property
    def written_bytes(self) -> int:
        """All that was written since `open`: records, heads, footers, journals."""
        raise NotImplementedError

    def close(self) -> None:
        """Seal what is open, write what waits, let go of the directory. Idempotent; raises nothing."""
        raise NotImplementedError
