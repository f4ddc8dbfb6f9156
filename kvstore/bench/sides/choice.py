"""Which sides take part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.bench.sides.iperf3 import Iperf3
from kvstore.bench.sides.mooncake import Mooncake
from kvstore.bench.sides.nixl import Nixl
from kvstore.bench.sides.ours import OUR_VARIANTS
from kvstore.bench.sides.raw_native import RawNative
from kvstore.bench.sides.raw_python import RawPython
from kvstore.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.bench.sides.side import Side

RAW_CONNECTIONS = (1, 2, 4)
MOONCAKE_THREADS = (1, 2)
RAW = "raw"
BASELINES: dict[str, tuple[Side, ...]] = {
    RAW: tuple(RawNative(connections) for connections in RAW_CONNECTIONS),
    "raw-python": tuple(RawPython(connections) for connections in RAW_CONNECTIONS),
    "iperf3": tuple(Iperf3(connections) for connections in (1, 2)),
    "mooncake": tuple(Mooncake(threads) for threads in MOONCAKE_THREADS),
    "nixl": (Nixl(),),
}
"""By the name that the command line has for them."""
BASELINES_DEFAULT = (RAW, "iperf3", "mooncake", "nixl")
SIDES: dict[str, Side] = {side.name: side for sides in (OUR_VARIANTS, *BASELINES.values()) for side in sides}
"""By the name that stands in tables; processes tell each other this one."""


def baselines(names: Iterable[str]) -> list[Side]:
    """The sides of these names, each once.

    Raises:
        BenchmarkError: there is no such name.
    """
    chosen: dict[str, Side] = {}
    for name in names:
        if name not in BASELINES:
            raise BenchmarkError(f"there is no baseline {name!r}; there are {', '.join(BASELINES)}, and none")
        chosen.update({side.name: side for side in BASELINES[name]})
    return list(chosen.values())


def side_named(name: object) -> Side:
    """Raises `BenchmarkError` for a name that the other machine knows and this one does not."""
    if not isinstance(name, str) or name not in SIDES:
        raise BenchmarkError(f"there is no side {name!r} here; run the same version of kvstore on both machines")
    return SIDES[name]
