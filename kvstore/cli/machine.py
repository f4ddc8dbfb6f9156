"""What `kvstore doctor` finds out about the machine: CPU, memory, limits."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from contextlib import closing
from pathlib import Path

from kvstore.cli.finding import Finding
from kvstore.cli.processes import process_findings
from kvstore.errors import KVStoreError
from kvstore.tiers import ArenaTier
from kvstore.tiers.arena import SHARED_MEMORY_DIRECTORY
from kvstore.tiers.available_memory import memory_limit_bytes
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
ARENA_PROBE_BYTES = 4 << 20
"""Large enough that huge pages can hold it."""


def machine_findings() -> list[Finding]:
    return [_python(), _cpu(), *_memory(), _shared_memory(), _arena(), _huge_pages(), *process_findings(), *_limits()]


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
    limit = memory_limit_bytes()
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
    return [Finding("memory", True, offered, in_use="what dram= says, all of it at open")]


def _meminfo() -> dict[str, int]:
    """Bytes by name; counts of huge pages as they are."""
    fields = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return fields


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY_DIRECTORY)
    except OSError as error:
        return Finding("shm", False, f"{SHARED_MEMORY_DIRECTORY} cannot be used: {error.strerror}")
    return Finding(
        "shm",
        True,
        f"{SHARED_MEMORY_DIRECTORY} of {format_bytes(usage.total)}, {format_bytes(usage.free)} free",
        in_use="arenas with a name; without one they are memfds, which it does not limit",
    )


def _arena() -> Finding:
    """What an arena would be made of, seen by opening a small one."""
    try:
        with closing(ArenaTier(ARENA_PROBE_BYTES)) as tier:
            huge_pages, kind = tier.huge_pages, tier.kind
    except KVStoreError as error:
        return Finding("arena", False, "", why_not_better=str(error))
    pages = "huge pages" if huge_pages.in_use else "small pages"
    return Finding("arena", True, f"{kind}, {pages}", in_use="dram=", why_not_better=huge_pages.why_not)


def _huge_pages() -> Finding:
    fields = _meminfo()
    total, free = fields.get("HugePages_Total", 0), fields.get("HugePages_Free", 0)
    size = format_bytes(fields["Hugepagesize"]) if "Hugepagesize" in fields else "unknown size"
    transparent = read_text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    mode = transparent.partition("[")[2].partition("]")[0] or "unknown"
    return Finding(
        "hugepages",
        total > 0,
        f"{free} of {total} reserved pages of {size} free; transparent huge pages for shared memory: {mode}",
        in_use="an arena, where enough are free" if total else "",
        why_not_better="" if total else "reserve them: sysctl vm.nr_hugepages",
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
            in_use="" if memlock_low else "rings of io_uring, before Linux 5.12",
            why_not_better="raise it where io_uring finds too little memory: ulimit -l" if memlock_low else "",
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
