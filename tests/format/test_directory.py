"""The golden directory: today's writer makes these bytes, and two readers agree on what they mean."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.spec import ModelSpec
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from tests.format import make_directory
from tests.format.make_directory import GOLDEN, SPEC, TWIN
from tests.format.plain_directory_reader import read_directory
from tests.ssd.contents import check_recovered

DOCUMENT = Path(__file__).parents[2] / "docs/format.md"
SECTION = "## Worked example of a directory"


def test_the_writer_makes_the_golden_bytes(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    make_directory.write(made)
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in GOLDEN.iterdir())
    for path in GOLDEN.iterdir():
        written, golden = (made / path.name).read_bytes(), path.read_bytes()
        different = [at for at, (a, b) in enumerate(zip(written, golden, strict=False)) if a != b][:10]
        assert written == golden, f"{path.name}: {len(written)} bytes for {len(golden)}, different at {different}"
    assert json.loads(TWIN.read_text()) == make_directory.twin()


def test_the_reader_finds_what_counts() -> None:
    twin = json.loads(TWIN.read_text())
    assert ModelSpec.from_json(json.dumps(twin["spec"])) == SPEC
    with closing(SsdDirectory.open(DirectFiles(str(GOLDEN)), SPEC, capacity_bytes=1, is_read_only=True)) as directory:
        found = check_recovered(SPEC, directory)
        assert directory.losses.forgotten == 1
    names = {(key.hex(), SPEC.groups[group].name, (start, stop)) for key, group, _, start, stop in found}
    assert names == {
        (twin["nodes"][each["node"]]["key"], each["group"], tuple(each["units"]))
        for each in twin["records"]
        if each["counts"]
    }


def test_a_reader_without_kvstore_agrees() -> None:
    twin = json.loads(TWIN.read_text())
    spec, frames, entries = read_directory(GOLDEN)
    assert spec == twin["spec"]
    assert [frame.kind for frame in frames] == [3, 3, 1, 1, 1]
    assert len(entries) == len(twin["records"])
    for entry, expected in zip(entries, twin["records"], strict=True):
        node = twin["nodes"][expected["node"]]
        assert (entry.key.hex(), entry.parent.hex(), entry.grid.hex()) == (node["key"], node["parent"], node["grid"])
        assert (entry.end_tokens, entry.tail_ids, entry.cost_us) == (
            node["end_tokens"],
            node["tail_ids"],
            node["cost_us"],
        )
        assert entry.salt.decode() == twin["salt"]
        assert (spec["groups"][entry.name[0]]["name"], [*entry.name[2:]]) == (expected["group"], expected["units"])
        assert entry.is_forgotten is not expected["counts"]
        header = entry.record.header
        assert (header["kvstore.key"], header["kvstore.parent"]) == (node["key"], node["parent"])
        assert int(header["kvstore.end_tokens"]) == node["end_tokens"]


@pytest.mark.parametrize("offset", [8200, 8400, 12300])
def test_the_plain_reader_notices_damage(tmp_path: Path, offset: int) -> None:
    for path in GOLDEN.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".kvj":
            data[offset] ^= 1
        (tmp_path / path.name).write_bytes(data)
    with pytest.raises(AssertionError):
        read_directory(tmp_path)


def test_the_document_shows_the_golden_bytes() -> None:
    text = DOCUMENT.read_text()
    section = text[text.index(SECTION) :]
    shown_files = 0
    for part in re.split(r"\n`(?=journal-|segment-)", section)[1:]:
        name = part[: part.index("`")]
        golden = (GOLDEN / name).read_bytes()
        lines = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", part, re.MULTILINE)
        assert lines, name
        for offset, data in lines:
            shown = bytes.fromhex(data)
            assert golden[int(offset, 16) : int(offset, 16) + len(shown)] == shown, (name, offset)
        shown_files += 1
    assert shown_files == 2
