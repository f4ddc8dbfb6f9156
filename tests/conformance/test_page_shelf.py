"""An engine's pages against the kit for shelves."""

from __future__ import annotations

from contextlib import closing
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from kvstore.testing.shelf import ShelfConformance
from kvstore.testing.specs import hybrid

torch = pytest.importorskip("torch")

from kvstore.placement.gpu.page_names import PagedPath  # noqa: E402
from kvstore.placement.gpu.page_shelf import PageShelf  # noqa: E402
from kvstore.placement.gpu.page_table import Location, block_location  # noqa: E402
from kvstore.pool.rows import COST_US, DIGEST, STOP  # noqa: E402
from kvstore.testing.pages import EnginePages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.placement.shelf import Shelf
    from kvstore.pool import Hold
    from kvstore.store import Store

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA"))
PAGES = 600
ENGINE = EnginePages.alike(hybrid(4), style="heads first", pages=PAGES, page_tokens=3)


class TestPageShelf(ShelfConformance):
    """Pages of 3 tokens, and blocks of 4."""

    capacity_bytes: ClassVar[int] = ENGINE.register().size_bytes
    takes_records: ClassVar[bool] = False
    evicts: ClassVar[bool] = False

    @pytest.fixture(params=["cpu", CUDA])
    def shelf(self, request: pytest.FixtureRequest) -> Iterator[Shelf]:
        self.engine = EnginePages.alike(
            self.spec, style="heads first", pages=PAGES, page_tokens=3, device=request.param
        )
        self.free = count()
        with closing(PageShelf(self.engine.register())) as shelf:
            yield shelf

    def fill(self, shelf: Shelf, hold: Hold) -> int:
        """Write records into fresh pages, as an engine would have computed them there, and note them."""
        assert isinstance(shelf, PageShelf)
        pages, rows = shelf.pages, hold.placed.rows
        ids = np.array([next(self.free) for _ in range(-(-hold.path.tokens // 3))])
        locations: dict[tuple[int, int], Location] = {}
        for record in hold.placed.held():
            group = pages.spec.groups[record.name.group]
            end = record.header.end_tokens
            if pages.layout.group(record.name.group).page_tokens:
                start = end - record.header.valid_tokens
                self.engine.put_record(record, ids.tolist(), start)
                location = block_location(ids, 3, start, end, None)
            else:
                page = next(self.free)
                self.engine.put_record(record, [page], 0)
                location = Location(np.array([page]), 0, 0)
            assert group.name
            locations[record.name.node, record.name.group] = location
        table = np.concatenate((rows.table[:, : STOP + 1], rows.table[:, DIGEST : DIGEST + 1]), axis=1)
        named = PagedPath(
            hold.path, np.ascontiguousarray(table), b"".join(rows.digests), rows.table[:, COST_US].copy(), locations
        )
        return shelf.note_records(named, hold.salt)

    def test_shards_are_asked_for(self, shelf: Shelf, source: Store) -> None:
        """Pages hold all rows of their worker, so that other workers' shares are found in those of a whole one."""
        from kvstore.spec import Shard

        self.fill(shelf, self.write(source, range(12)))
        assert self.lengths(shelf, source, range(12), shard=Shard(1, 2)) == [12]
