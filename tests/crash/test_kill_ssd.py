"""Kill a process that appends to an SSD directory: what it was told is durable is there, bit for bit.

KVSTORE_KILLS=1000 is the long form. The seed is fixed; where the process is at that moment is up to the machine.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from tests.ssd.appender import SEGMENT_BYTES, SPEC, prompt
from tests.ssd.contents import check_recovered, path_of, whole_names

KILLS = int(os.environ.get("KVSTORE_KILLS", "100")) // 25
APPENDS_MAX = 12
PAUSE_S = 0.02
"""It dies up to this long after one of its first appends: that is somewhere in the next ones."""
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(120 + 10 * KILLS)


def test_what_was_reported_durable_outlives_the_process(tmp_path: Path) -> None:
    generator = random.Random(5)
    durable: set[int] = set()
    verified = 0
    for kill in range(KILLS):
        command = [sys.executable, "-m", "tests.ssd.appender", str(tmp_path), str(kill)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            lines = [process.stdout.readline() for _ in range(generator.randrange(1, APPENDS_MAX))]
            time.sleep(generator.random() * PAUSE_S)
            process.send_signal(signal.SIGKILL)
            # A line that was cut off is none that was said.
            lines += [line for line in process.stdout if line.endswith("\n")]
        durable.update(map(int, lines))
        with closing(
            SsdDirectory.open(
                DirectFiles(str(tmp_path)), SPEC, capacity_bytes=1 << 30, segment_bytes=SEGMENT_BYTES, is_read_only=True
            )
        ) as directory:
            found = check_recovered(SPEC, directory)
        verified += len(found)
        for number in durable:
            nodes = path_of(SPEC, prompt(number))
            names = {
                (nodes[node].key, group, span, units.start, units.stop)
                for node, group, span, units in whole_names(SPEC, nodes)
            }
            missing = names - found
            assert not missing, f"after kill {kill}: {len(missing)} records of prompt {number} are lost"
    assert durable
    assert verified >= len(durable)
