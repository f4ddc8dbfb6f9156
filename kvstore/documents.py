"""Documents on disk: JSON without repeated entries, and files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
