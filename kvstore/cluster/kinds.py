"""What a setting may be: each kind says so in words, and makes a value of what was written or refuses it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError
from kvstore.limits import GIB, NODE_SETTING_CHARACTERS_MAX
from kvstore.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

TIB = 1024 * GIB


@dataclass(frozen=True)
class Kind:
    """Values of one kind.

    Attributes:
        description: what a value is, to be read after "is not".
        parse: the value, which parses to itself; raises ValueError or TypeError for anything else.
    """

    description: str
    parse: Callable[[object], Any]


def parse_as(kind: Kind, key: str, value: object, origin: str) -> Any:
    """The value that a setting has.

    Raises:
        ConfigError: it is of another kind; the message names where it stands and what it may be.
    """
    try:
        return kind.parse(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{origin}: {key} = {shown(value)} is not {kind.description}") from error


def shown(value: object) -> str:
    """A value for a message, of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def flag() -> Kind:
    """True or false."""

    def parse(value: object) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Kind("true or false", parse)


def choice(*names: str) -> Kind:
    """One of some words."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(names)}", parse)


def text(what: str, *, most: int = NODE_SETTING_CHARACTERS_MAX, may_be_empty: bool = False) -> Kind:
    """A line of text, or a path."""

    def parse(value: object) -> str:
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(plain, str) or len(plain) > most or not plain.isprintable():
            raise ValueError
        if not plain and not may_be_empty:
            raise ValueError
        return plain

    return Kind(f"{what}, of at most {most} printable characters", parse)


def plain_name(most: int) -> Kind:
    """Letters, digits, and what file names have between them."""
    form = re.compile(rf"[A-Za-z0-9._-]{{1,{most}}}")

    def parse(value: object) -> str:
        if not isinstance(value, str) or not form.fullmatch(value):
            raise ValueError
        return value

    return Kind(f"a name of 1 to {most} letters, digits, '.', '_' and '-'", parse)


def several(kind: Kind, most: int, *, least: int = 0) -> Kind:
    """A list of values of one kind, each of them once."""

    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise ValueError
        parsed = tuple(kind.parse(item) for item in value)
        if len(set(parsed)) != len(parsed):
            raise ValueError
        return parsed

    return Kind(f"a list of {least} to {most} different entries, each {kind.description}", parse)


def whole(least: int, most: int) -> Kind:
    """A whole number."""

    def parse(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError
        return value

    return Kind(f"a whole number from {least} to {most}", parse)


def seconds(least: float, most: float) -> Kind:
    """A number of seconds, not nan."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError
        return float(value)

    return Kind(f"a number of seconds from {least:g} to {most:g}", parse)


def size(least: int = 1, most: int = 1024 * TIB) -> Kind:
    """Bytes, as a number or as people write them."""

    def parse(value: object) -> int:
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise TypeError
        if isinstance(value, str) and len(value) > 64:
            raise ValueError
        parsed = parse_bytes(value)
        if not least <= parsed <= most:
            raise ValueError
        return parsed

    return Kind(f"a size from {least} to {most} bytes, such as 8589934592 or '8GiB'", parse)
