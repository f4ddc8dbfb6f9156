"""The store against plain dictionaries. `KVSTORE_STATEFUL_EXAMPLES=2000` looks much longer."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from kvstore.pool import LRUPolicy, StoreLimits
from kvstore.testing.lifetime_machine import LifetimeMachine
from kvstore.testing.specs import dense, hybrid, latent, pure_state
from kvstore.testing.store_machine import StoreMachine

EXAMPLES = int(os.environ.get("KVSTORE_STATEFUL_EXAMPLES", "60"))
STEPS = 40

pytestmark = pytest.mark.timeout(900 if EXAMPLES <= 100 else 0)
"""A failing run is made small before it is shown, which takes longer than the run."""

ROOMY_BYTES = 16 << 20
TIGHT_BYTES = 120 << 10
QUOTAS = StoreLimits(quota="100KiB", quotas={b"other": "60KiB"})


def _case(machine: type[StoreMachine], examples: int) -> type:
    case = machine.TestCase
    case.settings = settings(
        settings.default,
        max_examples=max(1, examples),
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestRoomyHybrid = _case(StoreMachine.for_spec(hybrid(4), dram_bytes=ROOMY_BYTES), EXAMPLES)
TestTightHybrid = _case(StoreMachine.for_spec(hybrid(4), dram_bytes=TIGHT_BYTES), EXAMPLES)
TestTightPushed = _case(StoreMachine.for_spec(hybrid(4), dram_bytes=TIGHT_BYTES, policy=LRUPolicy), EXAMPLES // 2)
TestQuotaHybrid = _case(StoreMachine.for_spec(hybrid(4), dram_bytes=ROOMY_BYTES, limits=QUOTAS), EXAMPLES // 2)
TestQuotaPushed = _case(
    StoreMachine.for_spec(hybrid(4), dram_bytes=TIGHT_BYTES, limits=QUOTAS, policy=LRUPolicy), EXAMPLES // 3
)
TestLivesHybrid = _case(LifetimeMachine.for_spec(hybrid(4), dram_bytes=ROOMY_BYTES), EXAMPLES // 2)
TestLivesTightHybrid = _case(LifetimeMachine.for_spec(hybrid(4), dram_bytes=TIGHT_BYTES, limits=QUOTAS), EXAMPLES // 2)
TestLivesDense = _case(LifetimeMachine.for_spec(dense(4), dram_bytes=ROOMY_BYTES), EXAMPLES // 3)
TestRoomyPureState = _case(StoreMachine.for_spec(pure_state(4), dram_bytes=ROOMY_BYTES), EXAMPLES // 3)
TestTightDense = _case(StoreMachine.for_spec(dense(4), dram_bytes=TIGHT_BYTES), EXAMPLES // 3)
TestRoomyLatent = _case(StoreMachine.for_spec(latent(4), dram_bytes=ROOMY_BYTES), EXAMPLES // 3)
