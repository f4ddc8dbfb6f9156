"""Entries of a table in a TOML file: asked for one by one, each with its kind and its limits, and none left over."""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from kvstore.errors import DeploymentError, ProfileError, ScenarioError
from kvstore.limits import (
    SCENARIO_ENTRIES_MAX,
    SCENARIO_NUMBER_MAX,
    SCENARIO_NUMBER_MIN,
    SCENARIO_TEXT_CHARACTERS_MAX,
)
from kvstore.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

REQUIRED: Any = object()
"""Stands for a default where there is none."""
_SHOWN_CHARACTERS = 60


class Table:
    """One table. What it lacks gets the default that the caller passes, which is not checked.

    Args:
        values: the entries.
        file: what messages call the scenario.
        key: where the table stands in it; empty for the whole file.

    Raises:
        ScenarioError: an entry is missing, of another kind, or out of its limits; the message names file and key.
    """

    def __init__(self, values: object, file: str, key: str = "") -> None:
        self._file = file
        self._key = key
        self._asked: list[str] = []
        if not isinstance(values, dict):
            raise ScenarioError(f"{file}: {key} is {shown(values)}, not a table; write [{key}] and its entries below")
        self._values: Mapping[str, Any] = values

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._value(name, default)
        if value is default:
            return value
        if not isinstance(value, str) or not 1 <= len(value) <= SCENARIO_TEXT_CHARACTERS_MAX:
            raise self.wrong(name, value, f"text of 1 to {SCENARIO_TEXT_CHARACTERS_MAX} characters")
        return value

    def choice(self, name: str, choices: Sequence[str], default: Any = REQUIRED) -> Any:
        value = self._value(name, default)
        if value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return value

    def number(
        self,
        name: str,
        default: Any = REQUIRED,
        *,
        least: float = -inf,
        above: float = -inf,
        most: float = inf,
        below: float = inf,
    ) -> Any:
        value = self._value(name, default)
        if value is default:
            return value
        is_number = type(value) in (int, float) and _is_finite(value)
        if not is_number or not (least <= value <= most and above < value < below):
            raise self.wrong(name, value, f"a number {_limits(least, above, most, below)}".rstrip())
        if value and not SCENARIO_NUMBER_MIN <= abs(value) <= SCENARIO_NUMBER_MAX:
            raise self.wrong(
                name, value, f"a number from {SCENARIO_NUMBER_MIN:g} to {SCENARIO_NUMBER_MAX:g} in size, or 0"
            )
        return float(value)

    def whole(self, name: str, default: Any = REQUIRED, *, least: int, most: int) -> Any:
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number {_limits(least, -inf, most, inf)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def size(self, name: str, default: float) -> float:
        """Bytes, as a number or as `8TiB`; 0 for none."""
        value = self._value(name, default)
        if type(value) in (int, float) and _is_finite(value) and value >= 0:
            return float(value)
        try:
            if not isinstance(value, str):
                raise ValueError("neither a number nor a text")
            return float(parse_bytes(value))
        except (ValueError, OverflowError) as error:
            raise self.wrong(name, value, "a size: 0 for none, a number of bytes, or '8TiB'") from error

    def table(self, name: str) -> Table:
        """A table inside; an empty one where it is missing."""
        return Table(self._value(name, {}), self._file, self._at(name))

    def tables(self, name: str) -> list[Table]:
        """An array of tables; empty where it is missing."""
        values = self._value(name, [])
        if not isinstance(values, list) or len(values) > SCENARIO_ENTRIES_MAX:
            raise self.wrong(
                name, values, f"a list of at most {SCENARIO_ENTRIES_MAX} tables; write [[{name}]] above each"
            )
        return [Table(each, self._file, f"{self._at(name)}[{number}]") for number, each in enumerate(values)]

    def numbers(self) -> tuple[tuple[str, float], ...]:
        """All entries, which must be numbers, by name: settings that somebody else knows."""
        return tuple((name, self.number(name)) for name in sorted(self._values))

    def is_there(self, name: str) -> bool:
        return name in self._values

    def end(self) -> None:
        """Complain about entries that nobody asked for."""
        for name in self._values:
            if name not in self._asked:
                near = difflib.get_close_matches(name, self._asked, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(self._asked))}"
                raise ScenarioError(f"{self._file}: there is no entry {self._at(name)!r}; {hint}")

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Put file and key in front of what a value complains about."""
        try:
            yield
        except (DeploymentError, ProfileError) as error:
            where = f"{self._file}: {self._key}" if self._key else self._file
            raise ScenarioError(f"{where}: {error}") from error

    def wrong(self, name: str, value: object, wanted: str) -> ScenarioError:
        """The error of an entry that is not what it has to be."""
        return ScenarioError(f"{self._file}: {self._at(name)}={shown(value)} is not {wanted}")

    def _value(self, name: str, default: Any) -> Any:
        self._asked.append(name)
        if name in self._values:
            return self._values[name]
        if default is REQUIRED:
            raise ScenarioError(f"{self._file}: the entry {self._at(name)!r} is missing")
        return default

    def _at(self, name: str) -> str:
        return f"{self._key}.{name}" if self._key else name


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _is_finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an integer that no float64 holds
        return False


def _limits(least: float, above: float, most: float, below: float) -> str:
    parts = [
        f"above {above:g}" if above > -inf else "",
        f"of at least {least:g}" if least > -inf else "",
        f"at most {most:g}" if most < inf else "",
        f"below {below:g}" if below < inf else "",
    ]
    return " and ".join(part for part in parts if part)
