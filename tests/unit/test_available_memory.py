"""How much memory may be taken: of files as kernels write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvstore.tiers.available_memory import available_memory, free_huge_page_bytes, memory_limit_bytes

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
UNLIMITED_V1 = "9223372036854771712"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_machine_without_groups(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": "MemTotal: 2048 kB\nMemAvailable: 1024 kB\n"})
    found = available_memory(root)
    assert found is not None
    assert found.bytes == MIB
    assert "machine" in found.limited_by
    assert memory_limit_bytes(root) is None


def test_nothing_says_anything(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert memory_limit_bytes(tmp_path) is None


def test_version_2_counts_every_group_above(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": f"MemAvailable: {1 << 20} kB\n",
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": f"{10 * MIB}\n",
            "sys/fs/cgroup/a/memory.max": f"{256 * MIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{200 * MIB}\n",
        },
    )
    found = available_memory(root)
    assert found is not None
    assert found.bytes == 56 * MIB
    assert found.limited_by.endswith("a/memory.max)")
    assert memory_limit_bytes(root) == 256 * MIB


def test_cached_files_are_no_use_of_memory(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {20 * MIB}\nactive_file {30 * MIB}\ninactive_file {10 * MIB}\n",
        },
    )
    found = available_memory(root)
    assert found is not None
    assert found.bytes == 40 * MIB


@pytest.mark.parametrize("place", ["memory", "memory/group"])
def test_version_1(tmp_path: Path, place: str) -> None:
    """In a container the group that is named may be invisible, and its files lie at the top."""
    root = tree(
        tmp_path,
        {
            "proc/meminfo": f"MemAvailable: {1 << 20} kB\n",
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/group\n0::/\n",
            f"sys/fs/cgroup/{place}/memory.limit_in_bytes": f"{64 * MIB}\n",
            f"sys/fs/cgroup/{place}/memory.usage_in_bytes": f"{24 * MIB}\n",
            f"sys/fs/cgroup/{place}/memory.stat": f"total_inactive_file {4 * MIB}\n",
        },
    )
    found = available_memory(root)
    assert found is not None
    assert found.bytes == 44 * MIB
    assert memory_limit_bytes(root) == 64 * MIB


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
        },
    )
    assert available_memory(root) is None
    assert memory_limit_bytes(root) is None


def test_huge_pages_that_nobody_has_taken(tmp_path: Path) -> None:
    assert free_huge_page_bytes(tmp_path) == 0
    meminfo = "HugePages_Total: 9\nHugePages_Free: 5\nHugePages_Rsvd: 2\nHugepagesize: 2048 kB\n"
    assert free_huge_page_bytes(tree(tmp_path, {"proc/meminfo": meminfo})) == 6 * MIB
