"""Writing what a run or a comparison comes to: JSON, CSV, Parquet. A file is there whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kvstore._version import __version__
from kvstore.documents import whole_file
from kvstore.errors import SimulationError
from kvstore.simulate.report.columns import requests_table, samples_table
from kvstore.simulate.report.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from kvstore.simulate.report.values import Spread, Summary
    from kvstore.simulate.result import SimulationResult

SUMMARY_COLUMNS = (
    "scenario", "policy", "seed", "offered_per_s", "throughput_per_s", "goodput_per_s", "good_share", "meets_slo",
    "is_stable", "requests", "done", "rejected", "failed", "pending", "hit_share", "possible_share",
    "egress_mean_bytes_per_s", "wall_s",
)  # fmt: skip
SPREAD_COLUMNS = ("mean", "p50", "p90", "p99", "maximum")


def write_result(result: SimulationResult, directory: Path, summary: Summary | None = None) -> tuple[Path, ...]:
    """Write `summary.json`, and requests and samples as CSV and Parquet each, into a directory that is made if need be.

    Args:
        result: what was simulated.
        directory: files of these names in it are replaced.
        summary: of this result, where it was made already.

    Returns:
        The files.

    Raises:
        SimulationError: a file cannot be written.
    """
    written = list(write_summaries([summary or summarise(result)], directory, "summary"))
    for name, table in (("requests", requests_table(result)), ("samples", samples_table(result))):
        with report_file(directory / f"{name}.csv") as opened:
            pa.csv.write_csv(_without_dictionaries(table), opened)
        with report_file(directory / f"{name}.parquet") as opened:
            pa.parquet.write_table(table, opened, compression="zstd")
        written += [directory / f"{name}.csv", directory / f"{name}.parquet"]
    return tuple(written)


def write_summaries(
    summaries: Sequence[Summary], directory: Path, name: str, failures: Iterable[tuple[str, str]] | None = None
) -> tuple[Path, ...]:
    """Write figures as `NAME.json`, `{"version": …, "runs": […]}`, and, but for one run alone, as `NAME.csv`, too.

    Args:
        failures: as `summaries_document` takes them.

    Raises:
        SimulationError: a file cannot be written.
    """
    document = summaries_document(summaries, failures)
    written = [directory / f"{name}.json"]
    with report_file(written[0]) as opened:
        opened.write(json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")
    if failures is not None or len(summaries) != 1:
        written.append(directory / f"{name}.csv")
        with report_file(written[1]) as opened:
            opened.write(_csv(summaries).encode())
    return tuple(written)


def summaries_document(
    summaries: Sequence[Summary], failures: Iterable[tuple[str, str]] | None = None
) -> dict[str, Any]:
    """Figures as they are written; each run as `Summary.to_document` has it.

    Args:
        failures: of several runs, those that came to nothing: their name, and why.
    """
    runs = [summary.to_document() for summary in summaries]
    document: dict[str, Any] = {"version": 1, "kvstore": __version__, "runs": runs}
    if failures is not None:
        document["failed"] = [{"run": name, "error": error} for name, error in failures]
    return document


def check_directory(directory: Path) -> None:
    """Find out whether files can be written there, before anything is simulated for them; it is made if need be.

    Raises:
        SimulationError: they cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise _cannot_write(directory, error) from error


@contextmanager
def report_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` at the end, whole or not at all; its directory is made if need be.

    Raises:
        SimulationError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as opened:
            yield opened
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> SimulationError:
    reason = error.strerror or str(error)
    return SimulationError(f"{path} cannot be written ({reason}); give a directory that can, with room")


def _without_dictionaries(table: pa.Table) -> pa.Table:
    # Names as text; pyarrow writes no dictionaries as CSV.
    schema = pa.schema(
        [
            pa.field(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type)
            for field in table.schema
        ]
    )
    return table.cast(schema)


def _csv(summaries: Iterable[Summary]) -> str:
    summaries = list(summaries)
    keys = list(dict.fromkeys(key for summary in summaries for key, _ in summary.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spreads = [f"{name}_{column}_s" for name in ("ttft", "tpot") for column in SPREAD_COLUMNS]
    writer.writerow([*(f"set:{key}" for key in keys), *SUMMARY_COLUMNS, *spreads])
    for summary in summaries:
        settings = dict(summary.settings)
        row: list[Any] = [settings.get(key, "") for key in keys]
        row += [getattr(summary, column) for column in SUMMARY_COLUMNS]
        row += [value for spread in (summary.ttft, summary.tpot) for value in _values(spread)]
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def _values(spread: Spread) -> list[float | None]:
    return [getattr(spread, column) for column in SPREAD_COLUMNS]
