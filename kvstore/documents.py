"""Documents on disk: read up to a limit, JSON without repeated entries, and files there whole or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvstore.errors import KVStoreError


def read_document(
    path: str | os.PathLike[str], bytes_max: int, kind: str, error_class: type[KVStoreError], *, remedy: str = ""
) -> bytes:
    """A whole file, which has at most so many bytes.

    Args:
        kind: what messages call such a file.
        error_class: of what is raised.
        remedy: added where the file cannot be read.

    Raises:
        KVStoreError: of `error_class`: it cannot be read, or is larger.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        hint = f"; {remedy}" if remedy else ""
        raise error_class(f"the {kind} {os.fspath(path)} cannot be read: {error.strerror or error}{hint}") from error
    except ValueError as error:
        raise error_class(f"{os.fspath(path)!r} is no path: {error}") from error
    if len(data) > bytes_max:
        raise error_class(f"{os.fspath(path)} is larger than {format_bytes(bytes_max)}, the limit of a {kind}")
    return data


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `json` makes of an object (`object_pairs_hook`), which by itself lets the last of equal names win.

    Raises:
        ValueError: a name stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an entry is there twice")
    return found


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` at the end, whole or not at all.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as opened:
            yield opened
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
