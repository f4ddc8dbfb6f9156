"""Reading every record that a directory says it has, and comparing it with its checksums and the journal."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.limits import MIB, SSD_RECOVERY_DEADLINE_S
from kvstore.record import RecordHeader, record_layout, which_intact
from kvstore.spec import UnitRange
from kvstore.tiers.ssd.memory import aligned
from kvstore.tiers.ssd.rows import SLOT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.directory import SsdDirectory

_BATCH_BYTES = 128 * MIB


@dataclass(frozen=True)
class BadRecord:
    """A record that is not what the journal says.

    Attributes:
        key: of its node.
        name: group, span, first unit, unit after the last.
        place: segment, offset, slot bytes.
        reason: `damaged`, or why it could not be read.
    """

    key: bytes
    name: tuple[int, int, int, int]
    place: tuple[int, int, int]
    reason: str


def bad_records(
    directory: SsdDirectory, spec: ModelSpec, progress: Callable[[int], None] | None = None
) -> list[BadRecord]:
    """Those of the recovered records that cannot be read or whose bytes do not hold.

    Args:
        progress: called with the bytes of each part that was checked.
    """
    nodes, records = directory.recovered
    bad: list[BadRecord] = []
    # In the order of the files, not of the tree.
    order = np.lexsort((records.place[:, 1], records.place[:, 0]))
    sizes = np.cumsum(records.place[order, SLOT_BYTES].astype(np.int64))
    begin = 0
    while begin < len(order):
        before = int(sizes[begin - 1]) if begin else 0
        stop = max(begin + 1, int(np.searchsorted(sizes, before + _BATCH_BYTES, side="right")))
        part = order[begin:stop]
        for number, reason in _bad_of(directory, spec, part).items():
            key = nodes.keys[records.node[number]].tobytes()
            group, span, first, last = records.name[number].tolist()
            segment, offset, slot_bytes = records.place[number].tolist()
            bad.append(BadRecord(key, (group, span, first, last), (segment, offset, slot_bytes), reason))
        if progress is not None:
            progress(int(sizes[stop - 1]) - before)
        begin = stop
    return bad


def repair(directory: SsdDirectory, spec: ModelSpec, bad: list[BadRecord]) -> None:
    """Forget bad records, and with attention all that lies below it, for good.

    A journal that is damaged, or names what is missing, is written anew.

    Raises as `SsdDirectory.sync`.
    """
    deadline = Deadline.after(SSD_RECOVERY_DEADLINE_S)
    if directory.damaged_pages or directory.losses.without_segment:
        directory.rewrite_journal(*directory.recovered, deadline, directory.recovered_ends)
    for record in bad:
        directory.forget([record.key], [record.name[0] in spec.state_groups])
    directory.sync(deadline)


def _bad_of(directory: SsdDirectory, spec: ModelSpec, numbers: npt.NDArray[np.int64]) -> dict[int, str]:
    nodes, records = directory.recovered
    places = records.place[numbers]
    sizes = places[:, SLOT_BYTES].astype(np.int64)
    memory = aligned(int(sizes.sum()))
    addresses = (memory.ctypes.data + np.cumsum(sizes) - sizes).astype(np.uint64)
    bad: dict[int, str] = {}
    try:
        batch = directory.read(places, addresses)
    except OSError as error:
        if len(numbers) == 1:
            return {int(numbers[0]): str(error)}
        # One of their segments has gone: find out which.
        for number in numbers:
            bad.update(_bad_of(directory, spec, number.reshape(1)))
        return bad
    batch.wait(len(numbers), Deadline.after(SSD_RECOVERY_DEADLINE_S))
    errors = batch.errors()
    for at, reason in errors.items():
        bad[int(numbers[at])] = reason.strerror or errno.errorcode.get(reason.errno or errno.EIO, "EIO")
    names, inverse = np.unique(records.name[numbers], axis=0, return_inverse=True)
    for row, (group, span, first, last) in enumerate(names.tolist()):
        layout = record_layout(spec, group, span, UnitRange(first, last))
        of_class = [at for at in np.flatnonzero(inverse.reshape(-1) == row).tolist() if at not in errors]
        headers = []
        for number in numbers[of_class].tolist():
            node = int(records.node[number])
            end_tokens = int(nodes.end_tokens[node])
            headers.append(
                RecordHeader(
                    nodes.keys[node].tobytes(),
                    nodes.parents[node].tobytes(),
                    end_tokens,
                    spec.groups[group].valid_tokens(spec.block_tokens, end_tokens),
                    records.digests[int(records.grids[number])],
                    int(records.cost_us[number]),
                )
            )
        intact = which_intact(layout, addresses[of_class], headers)
        bad.update(
            {int(numbers[at]): "damaged" for at, is_intact in zip(of_class, intact, strict=True) if not is_intact}
        )
    return bad
