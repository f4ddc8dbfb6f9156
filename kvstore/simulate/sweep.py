"""A grid of simulations: one scenario, some of its entries at several values each."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from kvstore.errors import ScenarioError, SimulationError
from kvstore.limits import SWEEP_POINT_DEADLINE_S, SWEEP_POINTS_MAX
from kvstore.scenario import scenario_of
from kvstore.simulate.report.files import write_result
from kvstore.simulate.report.page import write_page
from kvstore.simulate.report.summary import summarise
from kvstore.simulate.workers import Ended, run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kvstore.scenario import Scenario
    from kvstore.simulate.report.values import Summary


@dataclass(frozen=True)
class Axis:
    """An entry of a scenario's file, and the values that it takes.

    Attributes:
        key: entries by name, joined by dots: `workload.arrivals.rate_per_s`, `seed`. In a list, the part names an
            entry by its `name` (`clusters.pd.decode_instances`), by `SOURCE>TARGET` (`links.prfaas>pd.loss`), or by
            its number from 0.
        values: as TOML has them.
    """

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One simulation of a sweep.

    Attributes:
        name: names its folder; no two of a sweep share it.
        settings: what was set, by key.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]
    scenario: Scenario


@dataclass(frozen=True)
class Output:
    """Where a simulation's files go.

    Attributes:
        directory: of the sweep; each point has a folder in it.
        has_page: whether a page is drawn.
    """

    directory: Path
    has_page: bool = False


def axis_of(text: str) -> Axis:
    """The axis that `KEY=A,B,C` describes; values are numbers, `true`, `false`, or text.

    Raises:
        SimulationError: the text has no key or no values, or names a value twice.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    parts = [part.strip() for part in values.split(",")]
    if not equals or not all(key.split(".")) or not all(parts):
        raise SimulationError(f"{text!r} is not KEY=A,B,C; write for example workload.arrivals.rate_per_s=2,2.5,3")
    if len(set(parts)) < len(parts):
        raise SimulationError(f"{text!r} names a value twice; leave one out")
    return Axis(key, tuple(map(_value, parts)))


def points_of(
    table: Mapping[str, Any], base_directory: str | Path, axes: Sequence[Axis], *, file: str = "scenario"
) -> tuple[Point, ...]:
    """The grid of all combinations, the last axis varying fastest; each scenario is read, so a wrong value shows here.

    Args:
        table: what a scenario's file says, unchecked (`kvstore.scenario.scenario_table`).
        base_directory: that its paths are relative to.
        axes: none for the scenario as it is.
        file: what messages call it.

    Raises:
        SimulationError: two axes share a key, or the grid has too many points.
        ScenarioError: an axis names what the scenario does not have, or a value cannot be used.
    """
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise SimulationError(f"a key is swept twice: {', '.join(keys)}; give all of its values at once")
    count = prod(len(axis.values) for axis in axes)
    if count > SWEEP_POINTS_MAX:
        raise SimulationError(f"a sweep has at most {SWEEP_POINTS_MAX} points, not {count}; leave values out")
    points = []
    for values in product(*(axis.values for axis in axes)):
        settings = tuple(zip(keys, values, strict=True))
        changed = deepcopy(dict(table))
        for key, value in settings:
            _set(changed, key, value, file)
        told = ", ".join(f"{key} = {value}" for key, value in settings)
        scenario = scenario_of(changed, base_directory, file=f"{file} with {told}" if told else file)
        points.append(Point(scenario.name, settings, scenario))
    return named_apart(points)


def named_apart(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with names of their own, numbered where there is more than one: they name folders."""
    width = len(str(len(points)))
    return tuple(
        Point(
            f"{number:0{width}d}-{_file_name(point.scenario.name)}" if len(points) > 1 else _file_name(point.name),
            point.settings,
            point.scenario,
        )
        for number, point in enumerate(points, 1)
    )


def run_point(
    point: Point,
    directory: Path | None = None,
    *,
    has_page: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Summary:
    """Simulate one point, write its files into the directory if there is one, and return its figures.

    Raises:
        SimulationError, TraceError: it cannot be simulated, or a file cannot be written.
    """
    from kvstore.simulate.simulation import simulate

    result = simulate(point.scenario, progress=progress)
    summary = summarise(result, settings=point.settings)
    if directory is not None:
        write_result(result, directory, summary)
        if has_page:
            write_page(result, directory, summary)
    return summary


def _run_in_folder(point: Point, output: Output | None) -> Summary:
    if output is None:
        return run_point(point)
    return run_point(point, output.directory / point.name, has_page=output.has_page)


def run_sweep(
    points: Sequence[Point],
    *,
    workers: int,
    output: Output | None = None,
    ended: Callable[[int, Ended[Summary]], None] | None = None,
    deadline_s: float = SWEEP_POINT_DEADLINE_S,
    work: Callable[[Point], Summary] | None = None,
) -> tuple[Ended[Summary], ...]:
    """Simulate points over processes; what fails loses nothing but itself. In the order of the points.

    Args:
        workers: processes at a time.
        output: where files go; None for figures alone.
        ended: told of each point as it ends, by number from 0.
        deadline_s: for one point.
        work: does a point, in place of `run_point`; a function of a module.

    Raises:
        SimulationError: the number of workers is out of its limits.
    """
    does = partial(_run_in_folder, output=output) if work is None else work
    return run_all(points, does, workers=min(workers, max(len(points), 1)), deadline_s=deadline_s, ended=ended)


def _value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _set(table: dict[str, Any], key: str, value: Any, file: str) -> None:
    *path, last = key.split(".")
    at: Any = table
    for depth, part in enumerate([*path, last]):
        is_last = depth == len(path)
        if isinstance(at, list):
            number = _number_of(at, part)
            if number is None or is_last:
                names = ", ".join(_names_of(at)) or "none"
                raise ScenarioError(f"{file}: {key!r} names no entry of a list of {names}; nothing can be set there")
            at = at[number]
        elif not isinstance(at, dict):
            raise ScenarioError(f"{file}: {key!r} goes through {part!r}, below a value that is no table; shorten it")
        elif is_last:
            at[part] = value
        else:
            at = at.setdefault(part, {})


def _number_of(entries: list[Any], part: str) -> int | None:
    names = _names_of(entries)
    if part in names:
        return names.index(part)
    return int(part) if part.isascii() and part.isdigit() and int(part) < len(entries) else None


def _names_of(entries: list[Any]) -> list[str]:
    def name(entry: Any) -> str:
        if not isinstance(entry, dict):
            return ""
        return str(entry.get("name", f"{entry.get('source', '')}>{entry.get('target', '')}"))

    return [name(entry) for entry in entries]


def _file_name(name: str) -> str:
    """A name that is safe as that of a folder."""
    kept = "".join(character if character.isalnum() or character in "-_" else "-" for character in name)
    return kept[:80] or "run"
