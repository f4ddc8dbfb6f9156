"""What `kvstore doctor` finds out about the machine: CPU, memory, limits."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from kvstore.cli.finding import Finding
from kvstore.units import format_bytes

CPU_FLAGS = (
    "sse4_2",
    "pclmulqdq",
    "avx2",
    "avx512f",
    "avx512_bf16",
    "vpclmulqdq",
    "sha_ni",
    "amx_tile",
    "crc32",
    "sve",
)
"""What the data path uses now or could."""
MEMLOCK_WANTED_BYTES = 64 << 20
NOFILE_WANTED = 4096
UNLIMITED_BYTES = 1 << 60
"""Control groups write "no limit" as a number near 2^63."""


def machine_findings() -> list[Finding]:
    return [_python(), _cpu(), *_memory(), _shared_memory(), _huge_pages(), *_limits()]


def _python() -> Finding:
    running = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    why = "" if sys.platform == "linux" else "kvstore is written for Linux; elsewhere nothing is tested"
    return Finding("python", True, running, in_use=sys.executable, why_not_better=why)


def _cpu() -> Finding:
    fields: dict[str, str] = {}
    for line in read_text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name", platform.processor() or "unknown model")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = ", ".join(flag for flag in CPU_FLAGS if flag in flags)
    return Finding("cpu", True, f"{platform.machine()}, {model}, {known}", in_use=f"{usable} of {os.cpu_count()} cores")


def _memory() -> list[Finding]:
    fields = _meminfo()
    if "MemTotal" not in fields:
        return [Finding("memory", True, "unknown: there is no /proc/meminfo")]
    total, free = fields["MemTotal"], fields.get("MemAvailable", 0)
    limit = _memory_limit()
    offered = f"{format_bytes(total)}, of which {format_bytes(free)} are available"
    if limit is not None and limit < total:
        return [
            Finding(
                "memory",
                True,
                offered,
                in_use=f"at most {format_bytes(limit)}",
                why_not_better="the control group of this process limits it; keep dram= below",
            )
        ]
    return [Finding("memory", True, offered, in_use="what dram= says, page by page as it fills")]


def _meminfo() -> dict[str, int]:
    """Bytes by name; counts of huge pages as they are."""
    fields = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return fields


def _memory_limit() -> int | None:
    """The smallest limit of this process's control group, version 2 or 1."""
    group = next((line[3:] for line in read_text("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    paths = [f"/sys/fs/cgroup{parent}/memory.max" for parent in (group, *map(str, Path(group).parents))]
    limits = []
    for path in (*paths, "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = read_text(path).strip()
        if text.isdigit() and int(text) < UNLIMITED_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("shm", False, f"/dev/shm cannot be used: {error.strerror}")
    return Finding(
        "shm",
        True,
        f"/dev/shm of {format_bytes(usage.total)}, {format_bytes(usage.free)} free",
        why_not_better="this version keeps a store in the memory of one process",
    )


def _huge_pages() -> Finding:
    fields = _meminfo()
    total, free = fields.get("HugePages_Total", 0), fields.get("HugePages_Free", 0)
    size = format_bytes(fields["Hugepagesize"]) if "Hugepagesize" in fields else "unknown size"
    transparent = read_text("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = transparent.partition("[")[2].partition("]")[0] or "unknown"
    return Finding(
        "hugepages",
        total > 0,
        f"{free} of {total} reserved pages of {size} free; transparent huge pages: {mode}",
        why_not_better="this version asks for none; slots are mapped one by one",
    )


def _limits() -> list[Finding]:
    try:
        import resource
    except ImportError:
        return []
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    nofile, nofile_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    memlock_low = memlock != endless and memlock < MEMLOCK_WANTED_BYTES
    nofile_low = nofile != endless and nofile < NOFILE_WANTED
    maps = read_text("/proc/sys/vm/max_map_count").strip()
    return [
        Finding(
            "limit.memlock",
            not memlock_low,
            "unlimited" if memlock == endless else format_bytes(memlock),
            why_not_better="this version pins no memory"
            + ("; RDMA and registered buffers will need more: ulimit -l" if memlock_low else ""),
        ),
        Finding(
            "limit.nofile",
            not nofile_low,
            "unlimited" if nofile == endless else f"{nofile} open files, up to {nofile_hard}",
            in_use="a few per connection",
            why_not_better="raise it for nodes with many peers: ulimit -n" if nofile_low else "",
        ),
        *(
            [Finding("limit.max_map_count", True, f"{maps} memory mappings", in_use="neighbours are merged")]
            if maps
            else []
        ),
    ]


def read_text(path: str) -> str:
    """A file of the kernel's, or nothing where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
