"""Resume points that are kept on a shelf and looked for there again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.pool import Hold
from kvstore.spec import WHOLE
from kvstore.testing.shelf import Landing, intact
from kvstore.testing.specs import put_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.placement import Shelf
    from kvstore.store import Store

TEST_S = 30.0


def write(source: Store, ids: Sequence[int]) -> Hold:
    with source.write(source.prompt(ids)) as writer:
        put_all(writer)
        writer.commit()
    best = source.match((*ids, 0)).best
    assert best is not None
    hold = source.pool.hold(best.path)
    assert isinstance(hold, Hold)
    return hold


def keep(shelf: Shelf, hold: Hold) -> int:
    return shelf.keep(hold.path, hold.salt, hold.placed).result(TEST_S)


def loads(shelf: Shelf, original: Hold) -> bool:
    """Whether the resume point is there, and every record of it right."""
    hold = shelf.hold(original.path, shard=WHOLE)
    if hold is None:
        return False
    numbers = np.arange(len(hold.rows))
    landing = Landing(hold.rows, numbers)
    failed = hold.load(numbers, landing.addresses).wait(len(numbers), Deadline.after(TEST_S))
    hold.release()
    return not failed and intact(hold.rows, numbers, landing.addresses)
