"""Writes the golden directory of format version 1. Run once, by hand: `python -m tests.format.make_directory`.

Like the golden records it is never written again: a change of the format gets a new version and new files.
"""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from kvstore.spec import ModelSpec
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from tests.format.make_vectors import ATTENTION, GATED_DELTA
from tests.ssd.contents import append, cost_of, deadline, grid_of, load_of, path_of

if TYPE_CHECKING:
    from tests.ssd.contents import Node

GOLDEN = Path(__file__).parent / "directory"
TWIN = Path(__file__).parent / "directory.json"
TOKENS = (11, 12, 13, 14, 15, 16, 17)
SALT = b"tenant-7"
SPEC = ModelSpec("golden", "weights of a directory", 4, (ATTENTION, GATED_DELTA), (("rope", "none"),))
ATTENTION_OF, STATES_OF = 0, 1


def nodes() -> list[Node]:
    """A whole block, and a tail of three tokens."""
    return path_of(SPEC, TOKENS, SALT)


def write(directory: Path) -> None:
    """Three frames: the block; its tail with states at seven tokens; and that these states were dropped."""
    block, tail = nodes()
    units = [group.all_units for group in SPEC.groups]
    source = random.Random("directory")
    with (
        patch("os.urandom", source.randbytes),
        closing(SsdDirectory.open(DirectFiles(str(directory)), SPEC, capacity_bytes=1 << 20)) as opened,
    ):
        append(opened, load_of(SPEC, [block], [(0, ATTENTION_OF, 0, units[ATTENTION_OF])]))
        names = [(0, ATTENTION_OF, 0, units[ATTENTION_OF]), (0, STATES_OF, 0, units[STATES_OF])]
        append(opened, load_of(SPEC, [tail], names))
        opened.forget([tail.key], [True])
        opened.sync(deadline())
    (directory / "lock").unlink()


def twin() -> dict[str, Any]:
    """What the files mean."""
    block, tail = nodes()
    return {
        "directory_version": 1,
        "spec": json.loads(SPEC.to_json()),
        "salt": SALT.decode(),
        "nodes": [
            {
                "key": node.key.hex(),
                "parent": node.parent.hex(),
                "end_tokens": node.end_tokens,
                "tail_ids": list(node.tail_ids),
                "root": node.root[0].hex(),
                "grid": grid_of(node).hex(),
                "cost_us": cost_of(node),
            }
            for node in (block, tail)
        ],
        "records": [
            {"node": 0, "group": "attention", "units": [0, 2], "counts": True},
            {"node": 1, "group": "attention", "units": [0, 2], "counts": True},
            {"node": 1, "group": "gated_delta", "units": [0, 4], "counts": False},
        ],
    }


if __name__ == "__main__":
    if GOLDEN.exists():
        raise SystemExit(f"{GOLDEN} exists; golden files are never written again")
    GOLDEN.mkdir()
    write(GOLDEN)
    TWIN.write_text(json.dumps(twin(), indent=1) + "\n")
