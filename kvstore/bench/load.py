"""What both halves of a side are told: the bytes, and how to move them. Plain values, sent as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvstore.bench.cases import BATCHES_MAX, check_prompt, record_sizes_bytes
from kvstore.errors import BenchmarkError, KVStoreError
from kvstore.spec import ModelSpec, ReuseRule

if TYPE_CHECKING:
    from kvstore.bench.cases import Case

GAP_BYTES = 4096
"""Between the records of a baseline's buffer, as headers lie between ours: nothing may be merged into one copy."""
SLAB_SPARE_BYTES = 32 << 20
POOL_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Load:
    """One case as one side moves it.

    Attributes:
        spec_json, fingerprint: the model, and what both machines must agree on about it.
        tokens, batches: length of each prompt, and how many make a round.
        seed: of the contents.
        connections: of ours; 0 is the library's default.
        congestion: name of the algorithm; empty is our own choice.
        baseline_congestion: the same for baselines that can be told; empty is the system's choice.
        pacing_bytes_per_s: 0 is unpaced.
        deadline_s: the longest that one round may take.
        host: this half's own address.
    """

    spec_json: str
    fingerprint: str
    tokens: int
    batches: int
    seed: int
    connections: int
    congestion: str
    baseline_congestion: str
    pacing_bytes_per_s: float
    deadline_s: float
    host: str

    @classmethod
    def of(
        cls,
        case: Case,
        *,
        seed: int = 1,
        connections: int = 0,
        congestion: str = "",
        baseline_congestion: str = "",
        pacing_bytes_per_s: float = 0.0,
        deadline_s: float = 60.0,
        host: str = "127.0.0.1",
    ) -> Load:
        return cls(
            case.spec.to_json(), case.spec.fingerprint.hex(), case.tokens, case.batches, seed, connections, congestion,
            baseline_congestion, pacing_bytes_per_s, deadline_s, host,
        )  # fmt: skip

    @classmethod
    def from_message(cls, message: Any) -> Load:
        """The load that `to_message` made, perhaps on another machine.

        Raises:
            BenchmarkError: it is none; or this machine derives another fingerprint from the same spec.
        """
        try:
            load = cls(**{field.name: message[field.name] for field in fields(cls)})
            fingerprint = load.spec.fingerprint.hex()
        except (KeyError, TypeError, KVStoreError) as error:
            raise BenchmarkError(f"this is no load of this version of the benchmark: {error}") from error
        if fingerprint != load.fingerprint:
            raise BenchmarkError(
                f"the spec of {load.spec.model!r} has the fingerprint {fingerprint[:16]} here and "
                f"{load.fingerprint[:16]} at the other end; run the same version of kvstore on both machines"
            )
        check_prompt(load.spec, load.tokens)
        if not isinstance(load.batches, int) or not 1 <= load.batches <= BATCHES_MAX:
            raise BenchmarkError(f"{load.batches!r} batches are not from 1 to {BATCHES_MAX}")
        return load

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_json(self.spec_json)

    @cached_property
    def record_bytes(self) -> tuple[int, ...]:
        return record_sizes_bytes(self.spec, self.tokens)

    @property
    def total_bytes(self) -> int:
        """Of one batch."""
        return sum(self.record_bytes)

    @property
    def buffer_bytes(self) -> int:
        """What a baseline holds at each end."""
        return self.batches * sum(GAP_BYTES + -(-size // GAP_BYTES) * GAP_BYTES for size in self.record_bytes)

    @property
    def pool_bytes(self) -> int:
        """What a store holds at each end: slots, an estimate of the index, and room for slabs that are not full."""
        from kvstore.record import record_layout

        spec = self.spec
        slots_bytes = 0
        for index, group in enumerate(spec.groups):
            times = self.tokens // spec.block_tokens if group.rule is ReuseRule.ATTENTION else 1
            for span in range(len(spec.spans[index])):
                slots_bytes += times * (record_layout(spec, index, span, group.all_units).slot_bytes + 1024)
        classes = sum(len(spans) for spans in spec.spans)
        return self.batches * slots_bytes * 5 // 4 + POOL_SPARE_BYTES + (classes - 1) * SLAB_SPARE_BYTES
