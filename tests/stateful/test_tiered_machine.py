"""A pool and a shelf against what was written. `KVSTORE_STATEFUL_EXAMPLES=2000` looks much longer."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from kvstore.testing.specs import dense, hybrid
from kvstore.testing.tiered_machine import TieredMachine

EXAMPLES = int(os.environ.get("KVSTORE_STATEFUL_EXAMPLES", "60"))
STEPS = 30

pytestmark = pytest.mark.timeout(900 if EXAMPLES <= 100 else 0)
"""A failing run is made small before it is shown, which takes longer than the run."""


def _case(machine: type[TieredMachine], examples: int) -> type:
    case = machine.TestCase
    case.settings = settings(
        settings.default,
        max_examples=max(1, examples),
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestRoomyHybrid = _case(TieredMachine.for_spec(hybrid(4), dram_bytes=1 << 20, shelf_bytes=16 << 20), EXAMPLES // 2)
TestTightMemory = _case(TieredMachine.for_spec(hybrid(4), dram_bytes=160 << 10, shelf_bytes=16 << 20), EXAMPLES // 2)
TestTightBoth = _case(
    TieredMachine.for_spec(hybrid(4), dram_bytes=160 << 10, shelf_bytes=200 << 10, is_roomy=False), EXAMPLES // 2
)
TestTightDense = _case(TieredMachine.for_spec(dense(4), dram_bytes=160 << 10, shelf_bytes=16 << 20), EXAMPLES // 3)
