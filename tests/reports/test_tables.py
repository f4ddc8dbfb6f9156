"""Tables and files of results: what goes in comes out, whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from kvstore.errors import SimulationError
from kvstore.simulate.report.columns import REQUEST_COLUMNS, SAMPLE_COLUMNS, requests_table, samples_table
from kvstore.simulate.report.files import report_file, write_result, write_summaries
from kvstore.simulate.report.summary import summarise
from kvstore.simulate.result import PARTS
from tests.reports.results import drawn

ROOT = Path(__file__).parents[2]


def test_requests_as_a_table() -> None:
    run = drawn(1)
    table = requests_table(run)
    assert table.column_names == list(REQUEST_COLUMNS)
    assert table["arrival_s"].to_pylist() == run.requests.arrival_s.tolist()
    for number, name in enumerate(PARTS):
        there = table[name].combine_chunks()
        assert there.null_count == int(np.isnan(run.requests.parts[:, number]).sum())
    rejected = [row for row in table.to_pylist() if row["outcome"] == "rejected"]
    assert rejected
    assert all(row["prefill"] is row["decode"] is row["tier"] is row["ttft_s"] is None for row in rejected)
    done = [row for row in table.to_pylist() if row["outcome"] == "done"]
    assert {row["prefill"] for row in done} == {"far", "near"}
    assert all(math.isclose(sum(row[part] for part in PARTS), row["ttft_s"]) for row in done)
    assert table.schema.metadata[b"kvstore.simulation.scenario"] == b"toy"


def test_samples_as_a_table() -> None:
    run = drawn(1)
    table = samples_table(run)
    assert table["link_bytes:far>near"].to_pylist() == run.samples.link_bytes["far", "near"].tolist()
    assert "prefill_waiting:near" in table.column_names
    assert "policy:mode" in table.column_names
    assert {name.partition(":")[0] for name in table.column_names} == {
        name.partition(":")[0] for name in SAMPLE_COLUMNS
    }


def test_files_hold_the_same(tmp_path: Path) -> None:
    run = drawn(2)
    names = {path.name for path in write_result(run, tmp_path / "new" / "folder")}
    directory = tmp_path / "new" / "folder"
    assert names == {path.name for path in directory.iterdir()}
    packed = pa.parquet.read_table(directory / "requests.parquet")
    assert packed.equals(requests_table(run))
    assert packed.schema.field("ttft_s").metadata[b"meaning"] == REQUEST_COLUMNS["ttft_s"].encode()
    plain = pa.csv.read_csv(directory / "requests.csv", convert_options=pa.csv.ConvertOptions(strings_can_be_null=True))
    assert plain["ttft_s"].to_pylist() == packed["ttft_s"].to_pylist()
    assert plain["decode"].to_pylist() == packed["decode"].to_pylist()
    assert pa.parquet.read_table(directory / "samples.parquet").num_rows == len(run.samples.at_s)
    (document,) = json.loads((directory / "summary.json").read_text())["runs"]
    assert document["ttft"]["p90"] == summarise(run).ttft.p90


def test_summaries_of_several_runs(tmp_path: Path) -> None:
    runs = [summarise(drawn(seed), settings=(("seed", seed),)) for seed in (3, 4)]
    _, table = write_summaries(runs, tmp_path, "sweep")
    with table.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [float(row["ttft_p90_s"]) for row in rows] == [run.ttft.p90 for run in runs]
    assert [row["set:seed"] for row in rows] == ["3", "4"]
    assert table.read_text().startswith("set:seed,scenario,policy,seed,")


def test_a_file_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    with report_file(target) as opened:
        opened.write(b"old")
    no_space = OSError(28, "no space left")
    with (
        pytest.raises(SimulationError, match=r"summary\.json cannot be written \(no space left\)"),
        report_file(target),
    ):
        raise no_space
    with pytest.raises(KeyboardInterrupt), report_file(target) as opened:
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SimulationError, match="cannot be written"), report_file(tmp_path / "file" / "summary.json"):
        pass


def test_docs_name_every_column() -> None:
    page = (ROOT / "docs" / "reports.md").read_text()
    for columns in (REQUEST_COLUMNS, SAMPLE_COLUMNS):
        for name, meaning in columns.items():
            assert f"| `{name}` | {meaning} |" in page
