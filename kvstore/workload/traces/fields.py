"""Reading a trace's files and fields; whatever is wrong is a `TraceError` that names file and place."""

from __future__ import annotations

import gzip
import json
import zlib
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from kvstore.errors import TraceError
from kvstore.limits import PROMPT_TOKENS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

ID_END = 1 << 63


def open_trace(path: Path) -> BinaryIO:
    """A file, unpacked if its name ends in .gz.

    Raises:
        TraceError: it cannot be opened.
    """
    try:
        return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be opened: {error.strerror or error}") from error


def read_some(file: BinaryIO, size_bytes: int, where: str) -> bytes:
    """At most so many bytes.

    Raises:
        TraceError: the file is damaged.
    """
    with _reading(where):
        return file.read(size_bytes)


def lines_of(path: Path, line_bytes_max: int) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, each with its place; empty ones are allowed at the end only.

    Raises:
        TraceError: the file cannot be read, a line is too long, or there is none.
    """
    number = empty = 0
    with open_trace(path) as file:
        while True:
            where = f"{path}, line {number + 1}"
            with _reading(where):
                line = file.readline(line_bytes_max + 1)
            if not line:
                break
            number += 1
            if len(line) > line_bytes_max:
                raise TraceError(f"{where}: longer than {line_bytes_max} bytes; this is no trace of requests")
            if not line.strip():
                empty = empty or number
                continue
            if empty:
                raise TraceError(f"{path}, line {empty}: empty, and more follows; the trace has a hole")
            yield where, line
    if number == 0 or empty == 1:
        raise TraceError(f"{path}: there is no request in it")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns what reading a damaged file raises into a `TraceError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{where}: the file is damaged or cut off ({error}); copy it again") from error


def object_of(text: bytes, where: str) -> dict[str, object]:
    """The JSON object that a text is.

    Raises:
        TraceError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON ({error})") from error
    return as_object(value, where)


def as_object(value: object, where: str) -> dict[str, object]:
    """A value that must be a JSON object.

    Raises:
        TraceError: it is none.
    """
    if not isinstance(value, dict):
        raise TraceError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


def number_of(fields: Mapping[str, object], name: str, where: str, default: float | None = None) -> float:
    """A number that is finite and not negative.

    Raises:
        TraceError: it is missing without a default, or something else.
    """
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300 or not isfinite(value):
        raise TraceError(f"{where}: {name!r} must be a number that is not negative, not {_shown(value)}")
    return float(value)


def tokens_of(fields: Mapping[str, object], name: str, where: str, least: int) -> int:
    """A number of tokens.

    Raises:
        TraceError: it is missing, less than `least`, or too large.
    """
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= PROMPT_TOKENS_MAX:
        raise TraceError(
            f"{where}: {name!r} must be a whole number from {least} to {PROMPT_TOKENS_MAX}, not {_shown(value)}"
        )
    return value


def ids_of(fields: Mapping[str, object], name: str, where: str) -> NDArray[np.uint64]:
    """Ids of blocks, `[ids]`.

    Raises:
        TraceError: they are missing, or not whole numbers below 2**63.
    """
    value = fields.get(name)
    if not isinstance(value, list):
        raise TraceError(f"{where}: {name!r} must be a list of block ids, not {_shown(value)}")
    for each in value:
        if type(each) is not int or not 0 <= each < ID_END:
            raise TraceError(f"{where}: {name!r} has {_shown(each)}; ids are whole numbers from 0, below 2**63")
    return np.array(value, np.uint64)


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
