"""The cells of the secondary tier: vLLM's own offloading, with kvstore behind its host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.engines.matrix import Cell, distance, holds, judge
from tests.engines.vllm.engine import Engine, Ran, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


FAULTS = ("zero_rows", "same_rows")
HOST_BYTES = 16 << 20
CACHED_LEAST = {"dense": 512, "window": 384, "hybrid": 256}
"""Of a prefix of 512 tokens: what vLLM itself offloads, and looks for, of windows and states that end with a prompt."""

CASES = {
    "tier": ("tier, cold", "tier, warm", "tier, two tenants", "tier, eviction before load"),
    "tier restart": ("tier, restarted, warm disk", "tier, corrupted record"),
    "tier attached": ("tier, attached", "tier, node killed"),
}


def offloading_of(settings: dict[str, Any] | None, host_bytes: int = HOST_BYTES) -> dict[str, Any]:
    """A `--kv-transfer-config` with vLLM's tiered offloading, and kvstore behind it unless there are no settings."""
    place = {"type": "KVStoreSecondaryTier", "module_path": "kvstore.adapters.vllm.offloading"}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_tiering",
            "cpu_bytes_to_use": host_bytes,
            "secondary_tiers": [] if settings is None else [place | settings],
        },
    }


@dataclass(frozen=True)
class Tools:
    """What the matrix of a model has for all cells.

    Attributes:
        start: an engine, by name and connector.
        pair: a case's prefix, and a prompt that goes on from it.
        reference: what the engine without kvstore says, on steps that end at given lengths.
        compared: distance to the reference of what ran, with the run and the reference.
    """

    start: Callable[..., Engine]
    pair: Callable[..., tuple[Request, Request]]
    reference: Callable[..., tuple[Any, ...]]
    compared: Callable[..., tuple[float, Ran, tuple[Any, ...]]]


class TierCells:
    """Of one model."""

    def __init__(self, tools: Tools, model: str, folder: Path, weights: str) -> None:
        self._tools = tools
        self._model = model
        self._folder = folder
        self._weights = weights

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of the tier."""
        return {"weights": self._weights, **more}

    def own(self) -> dict[str, Any]:
        """Of a tier that opens its store, where others may attach."""
        return self.settings(dram="96MiB", ssd=[f"{self._folder / 'tier'}-ssd:256MiB"], own_socket=self._socket)

    @property
    def _socket(self) -> str:
        return str(self._folder / "tier.sock")

    def _control(self, engine: Engine, case: str) -> float:
        """The least that any of the faults changes."""
        least = float("inf")
        for fault in FAULTS:
            prefix, full = self._tools.pair(f"{case}, {fault}")
            least = min(least, self._warm(engine, engine, prefix, full, fault=fault)[0])
        return least

    def _warm(
        self, first: Engine, then: Engine, prefix: Request, full: Request, **how: Any
    ) -> tuple[float, Ran, tuple[Any, ...]]:
        cold = first.generate(prefix)
        first.forget()  # which has its host memory written out
        return self._tools.compared(full, cold, then.generate(full, **how), how.get("fault", ""))

    def cells(self, engine: Engine) -> Iterator[Cell]:
        tools, name = self._tools, self._model
        prefix, full = tools.pair("tier warm")
        cold = engine.generate(prefix)
        broken = ["something was cached"] if cold.cached_tokens[0] else []
        reference = tools.reference(prefix, tuple(stop for _, stop in cold.steps[0]))
        yield judge("vllm", name, "tier, cold", reference=reference, answers=cold.answers, broken=broken)
        _, ran, reference = tools.compared(full, cold, engine.generate(full))
        yield self._judged("tier, warm", ran, reference, self._control(engine, "tier warm"))

        prefix, full = tools.pair("tier tenants")
        cold = engine.generate(Request(prefix.ids, 1, salt="tenant one"))
        other = engine.generate(Request(full.ids, full.max_tokens, salt="tenant two"))
        same = engine.generate(Request(full.ids, full.max_tokens, salt="tenant one"))
        broken = [] if other.cached_tokens[0] == 0 else [f"tenant two found {other.cached_tokens[0]} tokens"]
        broken += [] if same.cached_tokens[0] else ["tenant one found nothing"]
        difference, _, _ = tools.compared(full, cold, same)
        broken += [f"tenant one differs by {difference}"] if difference else []
        yield holds("vllm", name, "tier, two tenants", broken)

        prefix, full = tools.pair("tier evicted")
        _, ran, reference = self._warm(engine, engine, prefix, full, hook={"kind": "evict"})
        broken = [] if ran.hooks else ["nothing was evicted"]
        broken += [f"{ran.cached_tokens[0]} tokens came from somewhere"] if ran.cached_tokens[0] else []
        broken += [f"left: {leak}" for leak in engine.leaks()]
        yield judge("vllm", name, "tier, eviction before load", reference=reference, answers=ran.answers, broken=broken)

    def restart_cells(self, engine: Engine, flip: Any) -> Iterator[Cell]:
        tools, name = self._tools, self._model
        pairs = {case: tools.pair(f"tier {case}") for case in ("restart", *FAULTS, "corrupt")}
        engine.ask("flush", may_lack=True)  # as in cells.py
        cold = {case: engine.generate(prefix) for case, (prefix, _) in pairs.items()}
        engine.forget()
        engine.ask("flush")
        engine.quit()
        again = tools.start("tier-restarted", offloading_of(self.own()))
        control = float("inf")
        for fault in FAULTS:
            ran = again.generate(pairs[fault][1], fault=fault)
            control = min(control, tools.compared(pairs[fault][1], cold[fault], ran, fault)[0])
        full = pairs["restart"][1]
        _, ran, reference = tools.compared(full, cold["restart"], again.generate(full))
        yield self._judged("tier, restarted, warm disk", ran, reference, control)

        full = pairs["corrupt"][1]
        broken = [] if flip(self._folder / "tier-ssd") else ["no byte was flipped"]
        ran = again.generate(full)
        broken += [] if again.ask("store")["damaged_loads"] else ["no damage was noticed"]
        _, ran, reference = tools.compared(full, cold["corrupt"], ran)
        broken += [f"{ran.cached_tokens[0]} tokens were loaded"] if ran.cached_tokens[0] else []
        broken += [f"left: {leak}" for leak in again.leaks()]
        yield judge("vllm", name, "tier, corrupted record", reference=reference, answers=ran.answers, broken=broken)
        again.quit()

    def attached_cells(self) -> Iterator[Cell]:
        """One engine owns the store, another is attached to it."""
        tools, name = self._tools, self._model
        owner = tools.start("tier-owner", offloading_of(self.own() | {"ssd": []}))
        owner.wait_until_ready()
        guest = tools.start("tier-guest", offloading_of(self.settings(socket=self._socket)))
        least = float("inf")
        for fault in FAULTS:
            prefix, full = tools.pair(f"tier attached, {fault}")
            least = min(least, self._warm(owner, guest, prefix, full, fault=fault)[0])
        prefix, full = tools.pair("tier attached")
        _, ran, reference = self._warm(owner, guest, prefix, full)
        yield self._judged("tier, attached", ran, reference, least)

        prefix, full = tools.pair("tier killed")
        cold = owner.generate(prefix)
        owner.forget()
        guest.generate(prefix)  # it has seen that the store has these rows
        guest.forget()
        owner.kill()
        _, ran, reference = tools.compared(full, cold, guest.generate(full))
        broken = [f"{ran.cached_tokens[0]} tokens came from somewhere"] if ran.cached_tokens[0] else []
        yield judge("vllm", name, "tier, node killed", reference=reference, answers=ran.answers, broken=broken)

    def _judged(self, case: str, ran: Ran, reference: Sequence[Any], control: float) -> Cell:
        cached = ran.cached_tokens[0]
        missed = [] if cached >= CACHED_LEAST[self._model] else [f"{cached} tokens cached"]
        return judge(
            "vllm", self._model, case, reference=tuple(reference), answers=ran.answers, control=control,
            broken=missed, figures={"cached": cached, "differs by": distance(reference, ran.answers)},
        )  # fmt: skip
