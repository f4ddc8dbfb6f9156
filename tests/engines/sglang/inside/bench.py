"""Seconds that SGLang's controller takes to save pages and to read them back: `bench.py PLAN RESULTS`.

The plan has `extra` (settings of kvstore's backend), `files` (a folder for SGLang's own file backend), `shape`, `pages`
and `rounds`. The result is a list of rows: backend, interface, what, seconds of each round.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import rig as rigs
from rig import PAGE_TOKENS, Rig
from sglang.srt.mem_cache.radix_cache import RadixKey

LAYOUT = "page_first_direct"


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    shape, pages, rounds = tuple(plan["shape"]), plan["pages"], plan["rounds"]
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = plan["files"]
    rigs.prepare()
    with ExitStack() as stack:
        sides = {}
        for interface, extra in plan["extra"].items():
            sides["kvstore", interface] = stack.enter_context(Rig(LAYOUT, extra, shape=shape))
        sides["file", "generic"] = stack.enter_context(Rig(LAYOUT, {}, shape=shape, backend="file"))
        seconds = {(*side, what): [] for side in sides for what in ("save", "miss", "read")}
        for number in range(rounds + 1):
            first = 10_000 * (number + 1)
            key = RadixKey(list(range(first, first + pages * PAGE_TOKENS)))
            other = RadixKey(list(range(first + 5_000, first + 5_000 + pages * PAGE_TOKENS)))
            for side, one in sides.items():
                filled = one.fill(key, number)
                took = {}
                began = time.perf_counter()
                assert one.save(filled) == pages
                took["save"] = time.perf_counter() - began
                one.free(filled)
                began = time.perf_counter()
                assert one.find(other).storage_hit_count == 0
                took["miss"] = time.perf_counter() - began
                came = one.read(key)
                took["read"] = came.seconds
                assert came.pages == pages
                assert came.bytes_of == filled.bytes_of
                one.free(came)
                if number:  # one round is not counted
                    for what, value in took.items():
                        seconds[*side, what].append(value)
    rows = [{"backend": key[0], "interface": key[1], "what": key[2], "seconds": each} for key, each in seconds.items()]
    Path(sys.argv[2]).write_text(json.dumps(rows))
    os._exit(0)


if __name__ == "__main__":
    main()
