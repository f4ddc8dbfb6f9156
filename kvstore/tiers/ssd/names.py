"""Names of the files of a directory. They carry what tells a file from any other that ever had its number."""

from __future__ import annotations

import re
from dataclasses import dataclass

MANIFEST = "manifest"
LOCK = "lock"
NUMBER_MAX = 10**10 - 1
"""What has room in a name."""
_NAME = re.compile(r"(journal|segment)-([0-9]{10})-([0-9a-f]{16})\.(kvj|arrow)")


@dataclass(frozen=True)
class FileName:
    """A numbered file.

    Attributes:
        number: counted up for ever within a directory, journals and segments each.
        nonce: 64 random bits, drawn when the file was made, and named by whatever refers to it.
    """

    number: int
    nonce: int
    is_journal: bool

    def __str__(self) -> str:
        kind, ending = ("journal", "kvj") if self.is_journal else ("segment", "arrow")
        return f"{kind}-{self.number:010d}-{self.nonce:016x}.{ending}"


def parse_name(name: str) -> FileName | None:
    """What a name says; None for files of others."""
    match = _NAME.fullmatch(name)
    if match is None or (match[1] == "journal") != (match[4] == "kvj"):
        return None
    return FileName(int(match[2]), int(match[3], 16), match[1] == "journal")
