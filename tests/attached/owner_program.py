"""An owner process for tests: `python -m tests.attached.owner_program SOCKET IGNORED`; speaks like `program`."""

from __future__ import annotations

import json
import os
import sys

import kvstore
from kvstore.testing.specs import hybrid

BLOCK_TOKENS = 16
DRAM = "16MiB"


def main() -> None:
    with kvstore.open(hybrid(BLOCK_TOKENS), dram=DRAM, socket=sys.argv[1]) as store:
        print(json.dumps({"ok": os.getpid()}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            assert command["do"] == "check"
            store.pool.check()
            print(json.dumps({"ok": store.statistics().committed_bytes}), flush=True)


if __name__ == "__main__":
    main()
