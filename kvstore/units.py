"""Byte sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as `8GiB`, `64 MB`, `4096` or an integer.

    Raises:
        ValueError: it is neither a whole number nor a size in text, or it is not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{size!r} is not a size; write for example '8GiB', '512 MB' or a number of bytes")
        value = round(float(match[1]) * _UNITS[match[2].upper()])
    if value <= 0:
        raise ValueError(f"a size must be positive, got {size!r}")
    return value


def format_bytes(size_bytes: float) -> str:
    """A size for people: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")
