"""One line of `kvstore doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that kvstore may use, and how it stands here.

    Attributes:
        name: for `--require`, such as `crc32c.sse42` or `transport.tcp`.
        is_available: whether it can be used.
        offered: what this machine has.
        in_use: what kvstore uses of it; empty if nothing.
        why_not_better: why it is not used, or not faster, and what would help; empty if nothing would.
        is_demanded: the environment asks for it, so that its absence fails.
    """

    name: str
    is_available: bool
    offered: str
    in_use: str = ""
    why_not_better: str = ""
    is_demanded: bool = False
