"""How long the engine is inside the connector's methods: its scheduler and its forward pass wait for them."""

from __future__ import annotations

import time
from typing import Any

SCHEDULER = (
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output",
    "request_finished", "request_finished_all_groups",
)  # fmt: skip
WORKER = (
    "bind_connector_metadata", "handle_preemptions", "start_load_kv", "wait_for_layer_load", "save_kv_layer",
    "wait_for_save", "get_finished", "get_block_ids_with_load_errors", "build_connector_worker_meta",
    "clear_connector_metadata",
)  # fmt: skip


class Timers:
    """Calls and seconds by method, of the scheduler's connector and of the worker's."""

    def __init__(self, scheduler_connector: Any) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self._spent: dict[str, list[float]] = {}
        self._depth = 0
        for connector, names in ((scheduler_connector, SCHEDULER), (get_kv_transfer_group(), WORKER)):
            for name in names:
                if hasattr(connector, name):
                    setattr(connector, name, self._timed(name, getattr(connector, name)))

    def _timed(self, name: str, method: Any) -> Any:
        spent = self._spent.setdefault(name, [0, 0.0])

        def timed(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            begin = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:  # one that calls another is not counted twice
                    spent[0] += 1
                    spent[1] += time.perf_counter() - begin

        return timed

    def take(self) -> dict[str, tuple[float, float]]:
        taken = {name: (count, seconds) for name, (count, seconds) in self._spent.items() if count}
        for spent in self._spent.values():
            spent[:] = [0, 0.0]
        return taken
