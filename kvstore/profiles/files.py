"""Profiles as JSON files: read strictly, written so that they can be read again (docs/profiles.md)."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore.documents import read_document, whole_file, without_repeats
from kvstore.errors import ProfileError
from kvstore.limits import PROFILE_FILE_BYTES_MAX, PROFILE_NUMBER_MAX, PROFILE_TEXT_CHARACTERS_MAX
from kvstore.profile import INFERABLE, Curve, KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BuiltT = TypeVar("BuiltT")

FORMAT = "kvstore-profile"
VERSION = 1
SUFFIX = ".json"

_REQUIRED = (
    "format",
    "version",
    "name",
    "source",
    "accelerators",
    "tokens_max",
    "prefill_s_by_tokens",
    "kv_bytes",
    "decode_step_s_by_requests",
    "decode_batch_max",
)
_OPTIONAL = ("inferred", "details")


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that ship with the package, sorted."""
    entries = resources.files("kvstore.profiles").iterdir()
    return tuple(sorted(entry.name.removesuffix(SUFFIX) for entry in entries if entry.name.endswith(SUFFIX)))


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """A profile that ships with the package, by name, or one in a file.

    What has a directory or ends in `.json` is a path; anything else a name.

    Raises:
        ProfileError: there is none of that name, the file cannot be read, is larger than its limit, or says something
            that a profile cannot be; the message names file and entry.
    """
    text = os.fspath(name_or_path)
    if text.endswith(SUFFIX) or Path(text).name != text:
        return profile_from_text(_read(Path(text)), text)
    if text not in profile_names():
        raise ProfileError(
            f"no profile is named {text!r}; there are {', '.join(profile_names())}. A file is given by its path, which "
            f"ends in {SUFFIX}"
        )
    data = resources.files("kvstore.profiles").joinpath(text + SUFFIX).read_text(encoding="utf-8")
    return profile_from_text(data, f"the profile {text!r} of the package")


def write_profile(profile: Profile, path: str | os.PathLike[str], *, details: Mapping[str, Any] | None = None) -> None:
    """Write a profile to a file, replacing what is there in one step; `load_profile` reads it back equal.

    Args:
        details: how the numbers came about (machine, rounds, spread), for people. Readers skip it.

    Raises:
        ProfileError: it cannot be written, or is one that no reader accepts.
    """
    target = Path(path)
    text = profile_to_text(profile, details=details)
    profile_from_text(text, f"what was to be written to {target}")
    data = text.encode()
    if len(data) > PROFILE_FILE_BYTES_MAX:
        raise ProfileError(
            f"{target} would be {format_bytes(len(data))}, more than {format_bytes(PROFILE_FILE_BYTES_MAX)}, the limit "
            "of a profile; leave details out"
        )
    try:
        with whole_file(target) as file:
            file.write(data)
    except OSError as error:
        raise ProfileError(f"the profile {target} cannot be written: {error.strerror}") from error


def profile_to_text(profile: Profile, *, details: Mapping[str, Any] | None = None) -> str:
    """What a file says about a profile."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": profile.name,
        "source": profile.source,
        "accelerators": profile.accelerators,
        "tokens_max": profile.tokens_max,
        "prefill_s_by_tokens": _curve_document(profile.prefill),
        "kv_bytes": {
            "state_bytes": profile.kv.state_bytes,
            "token_bytes": profile.kv.token_bytes,
            "window_token_bytes": profile.kv.window_token_bytes,
            "window_tokens": profile.kv.window_tokens,
        },
        "decode_step_s_by_requests": _curve_document(profile.decode_step),
        "decode_batch_max": profile.decode_batch_max,
        "inferred": dict(profile.inferred),
    }
    if details:
        document["details"] = dict(details)
    text = json.dumps(document, indent=2, allow_nan=False)
    return _LIST_OF_NUMBERS.sub(lambda match: f"[{', '.join(match[1].split())}]".replace(",,", ","), text) + "\n"


def profile_from_text(text: str, name: str = "the profile") -> Profile:
    """The profile that `profile_to_text` described.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        ProfileError: another format or version, an entry that this version does not know, a missing one, or one that
            no profile can have.
    """
    try:
        document = json.loads(text, object_pairs_hook=without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{name} is no profile in JSON: {error}; write one with `kvstore profile`") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f'{name} has no "format": "{FORMAT}"; write one with `kvstore profile`')
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise ProfileError(f"{name} is of version {document.get('version')!r}; this release reads version {VERSION}")
    table = _Table(document, name, "")
    table.check_entries(_REQUIRED, _OPTIONAL)
    kv = table.table("kv_bytes")
    kv.check_entries(("state_bytes", "token_bytes"), ("window_token_bytes", "window_tokens"))
    return table.built(
        lambda: Profile(
            name=table.text("name"),
            source=table.text("source"),
            prefill=_curve(table.table("prefill_s_by_tokens")),
            kv=kv.built(
                lambda: KvSize(
                    state_bytes=kv.number("state_bytes"),
                    token_bytes=kv.number("token_bytes"),
                    window_token_bytes=kv.number("window_token_bytes", 0.0),
                    window_tokens=kv.whole("window_tokens", 0),
                )
            ),
            decode_step=_curve(table.table("decode_step_s_by_requests")),
            decode_batch_max=table.whole("decode_batch_max"),
            accelerators=table.whole("accelerators"),
            tokens_max=table.whole("tokens_max"),
            inferred=_inferred(table.table("inferred")) if "inferred" in document else (),
        )
    )


def _curve_document(curve: Curve) -> dict[str, Any]:
    if isinstance(curve, PolynomialCurve):
        return {"coefficients": list(curve.coefficients), "unit": curve.unit}
    points = [[x, y] for x, y in zip(curve.xs, curve.ys, strict=True)]
    return {"points": points, "interpolation": curve.interpolation}


def _curve(table: _Table) -> Curve:
    if "coefficients" in table.entries:
        table.check_entries(("coefficients",), ("unit",))
        return table.built(
            lambda: PolynomialCurve(tuple(table.numbers("coefficients")), unit=table.number("unit", 1.0))
        )
    table.check_entries(("points",), ("interpolation",))
    points = table.pairs("points")
    interpolation: Any = table.text("interpolation", "log-log")
    xs, ys = tuple(x for x, _ in points), tuple(y for _, y in points)
    return table.built(lambda: MeasuredCurve(xs, ys, interpolation))


def _inferred(table: _Table) -> tuple[tuple[str, str], ...]:
    table.check_entries((), INFERABLE)
    return tuple((what, table.text(what)) for what in table.entries)


class _Table:
    """Entries of one JSON object, with where they stand for messages."""

    def __init__(self, entries: Any, name: str, place: str) -> None:
        self._name = name
        self._place = place
        if not isinstance(entries, dict):
            raise ProfileError(f"{name}: {place or 'the file'} is no object with named entries")
        self.entries: dict[str, Any] = entries

    def check_entries(self, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
        missing = [entry for entry in required if entry not in self.entries]
        if missing:
            raise ProfileError(f"{self._name}: the entry {self._at(missing[0])!r} is missing")
        unknown = [entry for entry in self.entries if entry not in required + optional]
        if unknown:
            known = ", ".join(required + optional)
            raise ProfileError(f"{self._name}: the entry {self._at(unknown[0])!r} is unknown; known are {known}")

    def table(self, entry: str) -> _Table:
        return _Table(self.entries[entry], self._name, self._at(entry))

    def text(self, entry: str, default: str | None = None) -> str:
        value = self.entries.get(entry, default)
        if not isinstance(value, str) or not 1 <= len(value) <= PROFILE_TEXT_CHARACTERS_MAX:
            raise self._wrong(entry, value, f"text of 1 to {PROFILE_TEXT_CHARACTERS_MAX} characters")
        return value

    def whole(self, entry: str, default: int | None = None) -> int:
        value = self.entries.get(entry, default)
        if type(value) is not int or abs(value) > PROFILE_NUMBER_MAX:
            raise self._wrong(entry, value, f"a whole number of at most {PROFILE_NUMBER_MAX:g}")
        return value

    def number(self, entry: str, default: float | None = None) -> float:
        return self._number(entry, self.entries.get(entry, default))

    def numbers(self, entry: str) -> list[float]:
        value = self.entries[entry]
        if not isinstance(value, list):
            raise self._wrong(entry, value, "a list of numbers")
        return [self._number(entry, each) for each in value]

    def pairs(self, entry: str) -> list[tuple[float, float]]:
        value = self.entries[entry]
        if not isinstance(value, list) or not all(isinstance(each, list) and len(each) == 2 for each in value):
            raise self._wrong(entry, value, "a list of pairs of numbers, [[1024, 0.44], ...]")
        return [(self._number(entry, x), self._number(entry, y)) for x, y in value]

    def built(self, build: Callable[[], BuiltT]) -> BuiltT:
        """What `build` makes; a value's own complaint with the file and the entry in front."""
        try:
            return build()
        except ProfileError as error:
            if str(error).startswith(self._name):
                raise
            where = f"{self._name}: {self._place}: " if self._place else f"{self._name}: "
            raise ProfileError(where + str(error)) from error

    def _number(self, entry: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= PROFILE_NUMBER_MAX:
            raise self._wrong(entry, value, f"a number of at most {PROFILE_NUMBER_MAX:g}")
        return float(value)

    def _wrong(self, entry: str, value: Any, wanted: str) -> ProfileError:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
        return ProfileError(f"{self._name}: {self._at(entry)}={shown} is not {wanted}")

    def _at(self, entry: str) -> str:
        return f"{self._place}.{entry}" if self._place else entry


_LIST_OF_NUMBERS = re.compile(r"\[\n((?:\s+[-+.0-9e]+,?\n)+)\s+\]")
"""As `json` indents it; a text has no line breaks there."""
_SHOWN_CHARACTERS = 60


def _read(path: Path) -> str:
    remedy = f"the package has {', '.join(profile_names())}"
    data = read_document(path, PROFILE_FILE_BYTES_MAX, "profile", ProfileError, remedy=remedy)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not text: {error}; write a profile with `kvstore profile`") from error


def _no_constant(number: str) -> Any:
    raise ValueError(f"{number} is no number of a profile")
