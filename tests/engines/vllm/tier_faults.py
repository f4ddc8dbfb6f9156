"""As `faults.py`, for the secondary tier: what comes out of the store is changed, or is gone when it is loaded."""

from __future__ import annotations

import ctypes
from typing import Any

KINDS = ("zero_rows", "same_rows")


class Faults:
    """Rows are loaded as zeros, or all hold what the first does.

    Their order alone would not show: keys carry their positions.
    """

    def __init__(self) -> None:
        import kvstore.foreign.reading as reading

        self.kind = ""
        self.count = 0
        copy_out = reading.copy_out

        def copy_then_fault(objects: Any, layout: Any, *, verify: bool) -> list[bool]:
            are_sound: list[bool] = copy_out(objects, layout, verify=verify)
            regions = [each[0][0] for each in objects]
            if self.kind and regions:
                for region in regions:
                    if self.kind == "zero_rows":
                        ctypes.memset(region.address, 0, region.size_bytes)
                    else:
                        ctypes.memmove(region.address, regions[0].address, region.size_bytes)
                self.count += 1
            return are_sound

        reading.copy_out = copy_then_fault

    def begin(self, kind: str) -> None:
        if kind and kind not in KINDS:
            raise ValueError(f"no such fault: {kind}")
        self.kind, self.count = kind, 0

    def end(self) -> int:
        count, self.kind, self.count = self.count, "", 0
        return count


class Hooks:
    """Something that happens between vLLM's lookup, which found rows, and their load."""

    def __init__(self, tier: Any) -> None:
        self.count = 0
        self._hook: dict[str, Any] | None = None
        submit_load = tier.submit_load

        def first_the_hook(job: Any) -> None:
            if self._hook is not None and self._hook["kind"] == "evict":
                from kvstore.adapters.vllm.rows import split_key

                groups, hashes = zip(*map(split_key, job.keys), strict=True)
                store = tier._source.current()
                store.store.flush(30.0)  # what is just being written to disk cannot be removed
                self.count += sum(store.remove(groups, hashes))
            submit_load(job)

        tier.submit_load = first_the_hook

    def begin(self, hook: dict[str, Any] | None, stores: list[Any]) -> None:
        self._hook, self.count = hook, 0

    def end(self) -> int:
        self._hook = None
        return self.count
