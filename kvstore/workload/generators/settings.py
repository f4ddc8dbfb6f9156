"""The settings of generators: names, defaults, limits."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import PlanError, SimulationError
from kvstore.limits import PROMPT_TOKENS_MAX
from kvstore.schedule.planning.lengths import TruncatedLogNormal

if TYPE_CHECKING:
    from collections.abc import Mapping


class Setting(NamedTuple):
    """One setting of a generator.

    Attributes:
        least, most: what it may be.
        is_whole: whether it must be a whole number.
    """

    default: float
    least: float
    most: float
    text: str
    is_whole: bool = False


def tokens(default: int, text: str, least: int = 1) -> Setting:
    """A number of tokens, or the mean of one."""
    return Setting(default, least, PROMPT_TOKENS_MAX, text)


FIRST_PROMPT = {
    "mu": Setting(9.9, 0.0, 20.0, "mean of the logarithm of the prompt's tokens, before truncation"),
    "sigma": Setting(1.0, 1e-3, 10.0, "its standard deviation"),
    "tokens_min": tokens(128, "no prompt is shorter"),
    "tokens_max": tokens(131_072, "no prompt is longer"),
}
"""Settings of a truncated log-normal; the defaults are those of the paper's case study."""


def settings_of(kind: str, known: Mapping[str, Setting], given: tuple[tuple[str, float], ...]) -> dict[str, float]:
    """All settings of a generator, those that were not given at their defaults.

    Raises:
        SimulationError: one is unknown, twice there, or out of its limits.
    """
    values = {name: setting.default for name, setting in known.items()}
    seen: set[str] = set()
    for name, value in given:
        setting = known.get(name)
        if setting is None:
            raise SimulationError(f"a workload {kind!r} has no setting {name!r}; there are {', '.join(known)}")
        if name in seen:
            raise SimulationError(f"the setting {name!r} of the workload {kind!r} stands twice; leave one out")
        seen.add(name)
        if not (isfinite(value) and setting.least <= value <= setting.most):
            raise SimulationError(
                f"the setting {name}={value} of the workload {kind!r} must be from {setting.least:g} to "
                f"{setting.most:g}"
            )
        if setting.is_whole and value != int(value):
            raise SimulationError(f"the setting {name}={value} of the workload {kind!r} must be a whole number")
        values[name] = value
    return values


def prompt_lengths(kind: str, values: Mapping[str, float]) -> TruncatedLogNormal:
    """The distribution that the settings of a first prompt describe.

    Raises:
        SimulationError: they contradict each other.
    """
    try:
        return TruncatedLogNormal(values["mu"], values["sigma"], values["tokens_min"], values["tokens_max"])
    except PlanError as error:
        raise SimulationError(f"the workload {kind!r}: {error}") from error
