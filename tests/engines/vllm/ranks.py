"""Faults inside the tensor-parallel workers of an engine: methods that vLLM adds to them (`worker_extension_cls`).

Each worker is a process of its own, so what `faults.py` changes in the driver's process changes nothing here.
"""

from __future__ import annotations

import os
import signal
from typing import Any

RANK_KINDS = ("swapped", "blank")


class RankFaults:
    """Called through `LLM.collective_rpc`, in every worker."""

    rank: int

    def kvstore_open(self) -> int:
        """Put the faults in, switched off; the worker's process id."""
        import faults  # type: ignore[import-not-found]  # beside the driver, in the workers' path

        import kvstore.store.paged as paged
        from kvstore.adapters.vllm.metadata import NULL_PAGE
        from kvstore.adapters.vllm.registering import EnginePages
        from kvstore.spec import Shard
        from kvstore.store import Store

        state = _STATE
        stores: Any = Store
        pages_of: Any = EnginePages
        paged_of: Any = paged
        state["faults"] = faults.Faults()
        rank = self.rank
        match, load, save, check = stores.match, pages_of.load, pages_of.save, paged_of._check

        def check_unless_swapped(*arguments: Any) -> None:
            if state["kind"] != "swapped":  # a rank that reads another's share is refused here
                check(*arguments)

        def match_swapped(store: Any, *arguments: Any, **options: Any) -> Any:
            shard = options.get("shard")
            if state["kind"] == "swapped" and shard is not None:
                options["shard"] = Shard(shard.count - 1 - shard.index, shard.count)
                state["count"] += 1
            return match(store, *arguments, **options)

        def load_blank(pages: Any, lease: Any, order: Any, *arguments: Any, **options: Any) -> None:
            if state["kind"] != "blank" or not rank:
                load(pages, lease, order, *arguments, **options)
                return
            for group in pages._mapping.groups:
                for page in set(order.tables[group.index]) - {NULL_PAGE}:
                    pages._clear(group, page)
            state["count"] += 1

        def save_killed(pages: Any, *arguments: Any, **options: Any) -> None:
            save(pages, *arguments, **options)
            if state["kind"] == "killed" and rank:
                os.kill(os.getpid(), signal.SIGKILL)

        stores.match, pages_of.load, pages_of.save = match_swapped, load_blank, save_killed
        paged_of._check = check_unless_swapped
        return os.getpid()

    def kvstore_begin(self, kind: str) -> None:
        """Switch a fault on. `killed`: the second rank kills itself between what it has put and its commit."""
        _STATE["kind"], _STATE["count"] = kind, 0
        _STATE["faults"].begin("" if kind in (*RANK_KINDS, "killed") else kind)

    def kvstore_end(self) -> int:
        """Switch it off; how often it did something here."""
        count, _STATE["kind"] = _STATE["count"] + _STATE["faults"].end(), ""
        return int(count)


_STATE: dict[str, Any] = {"kind": "", "count": 0, "faults": None}
