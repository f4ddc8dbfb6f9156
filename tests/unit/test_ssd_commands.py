"""`kvstore verify` and `kvstore inspect` of directories of an SSD tier."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

import kvstore
from kvstore.cli.main import app
from kvstore.testing.specs import check_lease, hybrid, put_all
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from tests.ssd.contents import append, check_recovered, path_of, whole_load

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SPEC = hybrid(4)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def open_directory(path: Path) -> SsdDirectory:
    return SsdDirectory.open(DirectFiles(str(path)), SPEC, capacity_bytes=1 << 30)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    with closing(open_directory(path)) as opened:
        append(opened, whole_load(SPEC, path_of(SPEC, range(22), b"salt")))
    return path


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    return {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in path.iterdir()}


def test_a_sound_directory(directory: Path) -> None:
    before = snapshot(directory)
    result = invoke("verify", directory)
    assert result.exit_code == 0
    assert "8 records of test-hybrid, 64.00 KiB: sound" in result.stdout
    (document,) = json.loads(invoke("verify", directory, "--json").stdout)
    assert document["is_sound"]
    assert document["bad"] == []
    assert invoke("verify", directory, "--repair").exit_code == 0
    after = snapshot(directory)
    assert after.keys() == before.keys()


def test_damage_is_named_and_repaired_only_when_told(directory: Path) -> None:
    (segment,) = directory.glob("segment-0000000002-*")
    flip(segment, 8200)
    before = snapshot(directory)
    result = invoke("verify", directory)
    assert result.exit_code == 1
    assert "1 bad" in result.stdout
    assert "damaged: prefix" in result.stdout
    assert "segment 2 at 4096" in result.stdout
    assert snapshot(directory) == before
    result = invoke("verify", "--repair", directory)
    assert result.exit_code == 0
    assert "1 bad, forgotten" in result.stdout
    result = invoke("verify", directory)
    assert result.exit_code == 0
    # With the state of its node went its window.
    assert "6 records" in result.stdout
    with closing(open_directory(directory)) as opened:
        assert len(check_recovered(SPEC, opened)) == 6


def test_a_damaged_journal_is_written_anew(directory: Path) -> None:
    (journal,) = directory.glob("journal-*")
    flip(journal, 100)
    result = invoke("verify", directory)
    assert result.exit_code == 1
    assert "1 pages of the journal are damaged" in result.stdout
    assert invoke("verify", directory, "--repair").exit_code == 0
    assert invoke("verify", directory).exit_code == 0
    assert not journal.exists()


def test_a_directory_may_be_one_of_several(tmp_path: Path) -> None:
    """Its records hang on those of the other drive: they are checked, and repairing keeps them."""
    paths = [tmp_path / "a", tmp_path / "b"]
    where = [f"{path}:64MiB" for path in paths]
    ids = tuple(range(22))
    with kvstore.open(SPEC, dram="1MiB", ssd=where) as store:
        with store.write(ids) as writer:
            put_all(writer)
            writer.commit()
        store.flush(30.0)
    documents = json.loads(invoke("verify", *paths, "--json").stdout)
    assert min(document["records"] for document in documents) > 0
    assert sum(document["records"] for document in documents) == 8
    assert [document["not_counted"]["unreachable"] for document in documents] == [0, 0]
    shown = json.loads(invoke("inspect", *paths, "--json").stdout)
    assert [each["records"] for each in shown] == [document["records"] for document in documents]
    for path in paths:
        (journal,) = path.glob("journal-*")
        flip(journal, 4096 + 100)  # the second copy of a snapshot's end: nothing but a reason to write it anew
        assert invoke("verify", path, "--repair").exit_code == 0
    with kvstore.open(SPEC, dram="1MiB", ssd=where) as store:
        found = store.match((*ids, 99))
        assert (found.tokens, found.tier) == (len(ids), "ssd")
        with store.read(found, deadline_s=30.0) as lease:
            check_lease(lease, store.prompt(ids))
    for path in paths:
        for segment in path.glob("segment-*"):
            flip(segment, 6000)
    assert invoke("verify", *paths).exit_code == 1


def test_what_cannot_be_used_exits_with_2(directory: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (empty, "is no directory of an SSD tier"),
        (tmp_path / "nothing", "cannot be opened"),
        (tmp_path, "is no directory of an SSD tier"),
    ):
        result = invoke("verify", path, directory)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "sound" in result.stdout
    with closing(open_directory(directory)):
        assert invoke("verify", directory).exit_code == 0
        result = invoke("verify", "--repair", directory)
        assert result.exit_code == 2
        assert "in use by process" in result.stderr


def test_inspect_shows_a_directory(directory: Path, tmp_path: Path) -> None:
    before = snapshot(directory)
    (document,) = json.loads(invoke("inspect", directory, "--json").stdout)
    assert document["records"] == 8
    assert document["salts"] == 1
    assert [each["group"] for each in document["segments"]] == ["attention", "state", "window"]
    assert all(each["is_sealed"] for each in document["segments"])
    assert document["journals"][0]["rows"] == 8
    text = invoke("inspect", directory).stdout
    for part in (
        "test-hybrid",
        "segment-0000000001",
        "journal-0000000001",
        "8 of 6 nodes under 1 salts",
        "not verified",
    ):
        assert part in text
    assert snapshot(directory) == before
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert "is no directory of an SSD tier" in result.stderr


@pytest.mark.parametrize("how", ["deleted", "cut", "emptied", "renamed"])
def test_missing_records_are_no_sound_directory(directory: Path, how: str) -> None:
    segment = min(directory.glob("segment-*"))
    if how == "deleted":
        segment.unlink()
    elif how == "renamed":
        segment.rename(directory / "segment-renamed")
    else:
        with segment.open("r+b") as file:
            file.truncate(8192 if how == "cut" else 0)
    before = snapshot(directory)
    result = invoke("verify", directory)
    assert result.exit_code == 1
    assert "records are missing: their segment has gone, was cut, or is another file" in result.stdout
    (document,) = json.loads(invoke("verify", directory, "--json").stdout)
    assert document["missing"] > 0
    assert not document["is_sound"]
    assert snapshot(directory) == before
    result = invoke("verify", "--repair", directory)
    assert result.exit_code == 0
    assert "missing, forgotten" in result.stdout
    result = invoke("verify", directory)
    assert (result.exit_code, "sound" in result.stdout) == (0, True)


def test_repairing_one_of_several_directories_keeps_what_hangs_on_the_others(tmp_path: Path) -> None:
    nodes = path_of(SPEC, range(22), b"salt")
    path = tmp_path / "second"
    path.mkdir()
    load = whole_load(SPEC, nodes, start=3)  # what comes before lies in another directory
    with closing(SsdDirectory.open(DirectFiles(str(path)), SPEC, capacity_bytes=1 << 30, is_alone=False)) as opened:
        append(opened, load)
    assert invoke("verify", path).exit_code == 0
    flip(max(path.glob("segment-*")), 8200)
    assert invoke("verify", "--repair", path).exit_code == 0
    with closing(
        SsdDirectory.open(DirectFiles(str(path)), SPEC, capacity_bytes=1 << 30, is_alone=False, is_read_only=True)
    ) as opened:
        assert opened.recovered[1].place.size
