"""Faults that are put in below SGLang, on purpose: what a comparison has to notice."""

import re
from pathlib import Path
from typing import Any


def swap_pages(backend: Any, page_tokens: int) -> None:
    """Let the anchor's pages land in each other's slots."""
    get_v1, get = backend.batch_get_v1, backend.batch_get

    def swapped_v1(keys, host_indices, extra_info=None):
        return get_v1(keys, host_indices.view(-1, page_tokens).roll(1, 0).flatten(), extra_info)

    def swapped(keys, targets=None, sizes=None):
        came = get(keys, targets, sizes)
        return came[1:] + came[:1]

    backend.batch_get_v1, backend.batch_get = swapped_v1, swapped


def lie(backend: Any, pool: str = "kv") -> None:
    """Let the backend say that a pool's pages have come, and bring nothing."""
    if pool == "kv":
        backend.batch_get_v1 = lambda keys, host_indices, extra_info=None: [True] * len(keys)
        backend.batch_get = lambda keys, targets=None, sizes=None: targets
        return
    get_v2 = backend.batch_get_v2

    def nothing(transfers, extra_info=None):
        came = get_v2([each for each in transfers if each.name != pool], extra_info)
        return came | {each.name: [True] * len(each.keys) for each in transfers if each.name == pool}

    backend.batch_get_v2 = nothing


def forget(backend: Any, pool: str) -> None:
    """Let the backend take a pool's pages and not keep them: what a crash between two pools' writes leaves."""
    if pool == "kv":
        backend.batch_set_v1 = lambda keys, host_indices, extra_info=None: [True] * len(keys)
        backend.batch_set = lambda keys, values=None, targets=None, sizes=None: True
        return
    set_v2 = backend.batch_set_v2

    def kept(transfers, extra_info=None):
        done = set_v2([each for each in transfers if each.name != pool], extra_info)
        return done | {each.name: [True] * len(each.keys) for each in transfers if each.name == pool}

    backend.batch_set_v2 = kept


def mend(backend: Any) -> None:
    """Let the backend be itself again."""
    for name in ("batch_get_v1", "batch_get", "batch_get_v2", "batch_set_v1", "batch_set", "batch_set_v2"):
        vars(backend).pop(name, None)


def flush(backend: Any) -> None:
    """Let what was saved reach the disk."""
    if not backend.flush(30.0):
        raise RuntimeError("what was saved has not reached the disk")


def flip_in_files(folder: Path, pattern: bytes) -> int:
    """Flip a bit wherever a pattern is in the files of a folder; how often."""
    count = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                for found in re.finditer(re.escape(pattern), file.read()):
                    file.seek(found.start() + 3)
                    file.write(bytes([pattern[3] ^ 4]))
                    count += 1
    return count


def flip_in_memory(pattern: bytes) -> int:
    """Flip a bit wherever a pattern is in the stores of this process; how often."""
    count = 0
    seen = set()
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "r+b", buffering=0) as memory:
        for line in maps:
            span, mode, _, _, inode, *path = line.split()
            if "memfd" not in "".join(path) or "rw" not in mode or inode in seen:
                continue
            seen.add(inode)
            first, stop = (int(part, 16) for part in span.split("-"))
            memory.seek(first)
            for found in re.finditer(re.escape(pattern), memory.read(stop - first)):
                memory.seek(first + found.start() + 3)
                memory.write(bytes([pattern[3] ^ 4]))
                count += 1
    return count
