"""Appends, evictions, rewritings, power cuts and failing disks in any order: what was reported durable is there."""

from __future__ import annotations

import os

import pytest

from kvstore.testing.specs import hybrid, pure_state
from tests.ssd.model import DirectoryModel

RUNS = int(os.environ.get("KVSTORE_SSD_RUNS", "12"))
STEPS = 60


@pytest.mark.parametrize("seed", range(RUNS))
def test_what_is_durable_stays(seed: int) -> None:
    spec = (hybrid, pure_state)[seed % 4 == 3](4)
    model = DirectoryModel(spec, seed)
    model.run(STEPS)
    assert model.counts.verified > 0
    assert model.counts.reopened > 3


@pytest.mark.parametrize("skipped", ["segments", "journal", "names"])
def test_a_directory_that_skips_a_sync_is_found_out(skipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above must be able to fail."""

    def nothing(*_: object) -> None:
        pass

    if skipped == "segments":
        monkeypatch.setattr("kvstore.tiers.ssd.directory.sync", nothing)
    elif skipped == "journal":
        monkeypatch.setattr("kvstore.tiers.ssd.journal.Journal.sync", nothing)
    else:
        monkeypatch.setattr("kvstore.testing.forgetful_files.ForgetfulFiles.sync_names", nothing)

    def find_out() -> None:
        for seed in range(RUNS):
            DirectoryModel(hybrid(4), seed).run(STEPS)

    with pytest.raises(AssertionError):
        find_out()
