"""How much memory this process may still take, by the machine and by its control groups.

Memory that is promised and not there ends in the kernel's OOM killer; asked beforehand, it is an error with a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

UNLIMITED_BYTES = 1 << 60
"""Control groups of version 1 write "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class AvailableMemory:
    """What can still be taken, and what sets that limit."""

    bytes: int
    limited_by: str


def available_memory(root: Path = Path("/")) -> AvailableMemory | None:
    """The smallest of what the machine and each control group above this process have left; None if nothing says.

    Args:
        root: where `proc` and `sys` lie.
    """
    found = [limit for limit in (_of_machine(root), *_of_groups_v2(root), *_of_groups_v1(root)) if limit is not None]
    return min(found, key=lambda limit: limit.bytes, default=None)


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The smallest limit of the control groups of this process, version 2 or 1; None without one."""
    limits = [
        limit
        for folder, name in (
            *((folder, "memory.max") for folder in _folders_v2(root)),
            *((folder, "memory.limit_in_bytes") for folder in _folders_v1(root)),
        )
        if (limit := _number(folder / name)) is not None and limit < UNLIMITED_BYTES
    ]
    return min(limits, default=None)


def free_huge_page_bytes(root: Path = Path("/")) -> int:
    """Reserved huge pages that nobody has taken; they count neither as available memory nor against control groups."""
    found = {"HugePages_Free": 0, "HugePages_Rsvd": 0, "Hugepagesize": 0}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0])
    return max(0, found["HugePages_Free"] - found["HugePages_Rsvd"]) * found["Hugepagesize"] * 1024


def _of_machine(root: Path) -> AvailableMemory | None:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return AvailableMemory(int(rest.split()[0]) * 1024, "the machine (MemAvailable)")
    return None


def _of_groups_v2(root: Path) -> list[AvailableMemory | None]:
    return [
        _of_group(folder, "memory.max", "memory.current", ("inactive_file", "active_file"))
        for folder in _folders_v2(root)
    ]


def _of_groups_v1(root: Path) -> list[AvailableMemory | None]:
    return [
        _of_group(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
        )
        for folder in _folders_v1(root)
    ]


def _of_group(folder: Path, limit_name: str, usage_name: str, reclaimable: tuple[str, ...]) -> AvailableMemory | None:
    limit, usage = _number(folder / limit_name), _number(folder / usage_name)
    if limit is None or usage is None or limit >= UNLIMITED_BYTES:
        return None
    # Cached file contents count as used, and go when memory is needed.
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in reclaimable and value.isdigit():
            usage -= int(value)
    return AvailableMemory(max(0, limit - max(0, usage)), f"the control group ({folder / limit_name})")


def _folders_v2(root: Path) -> list[Path]:
    return _folders(root, "sys/fs/cgroup", lambda controllers, number: number == "0" and not controllers)


def _folders_v1(root: Path) -> list[Path]:
    return _folders(root, "sys/fs/cgroup/memory", lambda controllers, _: "memory" in controllers.split(","))


def _folders(root: Path, mount: str, is_it: Callable[[str, str], bool]) -> list[Path]:
    """The group of this process and those above it, as far as they are visible here."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if is_it(controllers, number):
            own = Path(group.lstrip("/"))
            return [root / mount / above for above in (own, *own.parents)]
    return []


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """A file of the kernel's, or nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
