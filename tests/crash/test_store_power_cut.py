"""The power goes off in the middle of any change that a store makes on its disks: nothing durable is lost.

KVSTORE_KILLS=1000 is the long form. Files are those of `kvstore.testing.forgetful_disk`: what was not synced is kept,
lost or torn by lot.
"""

from __future__ import annotations

import os
import random
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import SsdDirectoryError, StoreClosedError
from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from kvstore.placement.tiered import TieredPool
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store import Store
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.tiers import ArenaTier
from tests.crash.ledger import Ledger, Teller
from tests.crash.workload import DRAM_BYTES, SPECS, Workload, telling, verified_points

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.abc.files import Files
    from kvstore.spec import ModelSpec

CUTS = max(3, int(os.environ.get("KVSTORE_KILLS", "100")) // 20)
"""Of each case."""
CHANGES_MAX = 400
AMPLE, TIGHT = 64 << 20, 1 << 20
CASES = [(name, 1, AMPLE) for name in SPECS] + [("hybrid", 1, TIGHT), ("hybrid", 2, AMPLE), ("state", 2, TIGHT)]

pytestmark = pytest.mark.timeout(120 + 20 * CUTS)


def opened(spec: ModelSpec, disks: Mapping[str, ForgetfulDisk], capacity_bytes: int, dram_bytes: int) -> Store:
    places = tuple(SsdPlace(name, max(1 << 20, capacity_bytes // len(disks))) for name in disks)

    def files(place: SsdPlace, _options: SsdOptions) -> Files:
        return disks[place.path].files()

    tier = ArenaTier(dram_bytes, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=slot_sizes_bytes(spec))
    try:
        shelf = open_ssd(spec, SsdOptions(places, batch_bytes=64 << 10), make_files=files)
    except BaseException:
        tier.close()
        raise
    return Store(TieredPool(spec, tier, [shelf], close_deadline_s=2.0))


@pytest.mark.parametrize(("spec_name", "drives", "capacity_bytes"), CASES)
def test_cut_at_any_change(
    spec_name: str, drives: int, capacity_bytes: int, record_property: pytest.RecordProperty
) -> None:
    spec = SPECS[spec_name]
    chosen = random.Random(f"{spec_name} {drives} {capacity_bytes} cut")
    disks = {f"disk {number}": ForgetfulDisk(seed=chosen.randrange(1 << 30)) for number in range(drives)}
    ledger = Ledger()
    verified = checked = while_opening = 0
    with telling(Teller(ledger.note)):
        for cut in range(CUTS):
            boots = {name: disk.boots for name, disk in disks.items()}
            for disk in disks.values():
                # One in four early, that is while it is being opened.
                disk.cut_after(chosen.randrange(1, 20 if chosen.randrange(4) == 0 else CHANGES_MAX))
            try:
                with closing(opened(spec, disks, capacity_bytes, DRAM_BYTES)) as store:
                    workload = Workload(store, Teller(ledger.note), seed=cut)
                    while all(disk.boots == boots[name] for name, disk in disks.items()):
                        workload.step()
                    # One machine: the power of all its disks goes off at once.
                    for name, disk in disks.items():
                        if disk.boots == boots[name]:
                            disk.cut_power()
            except (SsdDirectoryError, StoreClosedError):
                while_opening += 1
                for name, disk in disks.items():
                    if disk.boots == boots[name]:
                        disk.cut_power()
            with closing(opened(spec, disks, capacity_bytes, 4 << 20)) as store:
                found = verified_points(store)
                lost = ledger.promised - found
                assert not lost, f"after cut {cut}: durable and lost: {[(p.number, p.tokens) for p in lost]}"
                pool = store.pool
                assert isinstance(pool, TieredPool)
                (shelf,) = pool.statistics().shelves
                assert not shelf.trouble
                assert not shelf.damaged_records
                pool.check()
            verified += len(found)
            checked += len(ledger.promised)
    assert ledger.reports
    assert verified >= checked
    print(
        f"{spec_name}, {drives} disks of {capacity_bytes >> 20} MiB: {CUTS} power cuts, {while_opening} while it was "
        f"opened; {ledger.reports} reports of durable resume points, {ledger.dropped} of them dropped on purpose; "
        f"{checked} looked for, 0 lost; {verified} resume points verified; {dict(ledger.done)}"
    )
    for name, value in (("cuts", CUTS), ("verified", verified), ("looked_for", checked), ("lost", 0)):
        record_property(name, value)
