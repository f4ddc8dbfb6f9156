"""How much of the fault tests is run: `make test` has the short form, KVSTORE_SOAK_ROUNDS the long one."""

from __future__ import annotations

import os
from typing import Any

import pytest

SOAK_ROUNDS = -(-int(os.environ.get("KVSTORE_SOAK_ROUNDS", "0")) // 10)
"""A round over a link takes ten times as long as one on loopback."""
LONG_FORM = pytest.mark.skipif(not SOAK_ROUNDS, reason="part of the long form: set KVSTORE_SOAK_ROUNDS")
FEW_AND_MANY = [pytest.param(1, marks=LONG_FORM), 3]
"""Connections of a transfer."""
TIMEOUT_S = 120 + 60 * SOAK_ROUNDS

TOKENS = 256
"""A prompt of the wide tiny model takes about 2 MiB."""
SEED = 1

WIDE: dict[str, Any] = {"width": 512, "dram": "64MiB", "frame_bytes": 64 << 10}
BRISK: dict[str, float] = {
    "progress_deadline_s": 2.0,
    "connect_deadline_s": 2.0,
    "resume_window_s": 1.0,
    "queue_deadline_s": 0.5,
}
"""Short waits where the short form waits for them to pass."""
