"""A program that appends to a directory until it is killed, and says what has been reported durable.

python -m tests.ssd.appender DIRECTORY SEED
"""

from __future__ import annotations

import random
import sys

from kvstore.testing.specs import hybrid
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from tests.ssd.contents import append, deadline, path_of, whole_load

SPEC = hybrid(4)
SEGMENT_BYTES = 128 << 10
BRANCHES = 256
ROWS_KEPT = 300
"""With more rows in the journal it is written anew."""


def prompt(seed: int) -> list[int]:
    """The token ids of a number."""
    return [*range(8), seed, seed + 1, seed + 2, seed + 3, *range(seed % 7)]


def main(path: str, seed: int) -> None:
    generator = random.Random(seed)
    directory = SsdDirectory.open(DirectFiles(path), SPEC, capacity_bytes=1 << 30, segment_bytes=SEGMENT_BYTES)
    print("ready", flush=True)
    while True:
        number = generator.randrange(BRANCHES)
        load = whole_load(SPEC, path_of(SPEC, prompt(number)))
        append(directory, load)
        print(number, flush=True)
        if directory.journal_rows > ROWS_KEPT:
            # What a shelf would keep: here all of it, as read back.
            files = DirectFiles(path)
            other = SsdDirectory.open(files, SPEC, capacity_bytes=1 << 30, is_read_only=True)
            directory.rewrite_journal(*other.recovered, deadline(), other.recovered_ends)
            other.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
