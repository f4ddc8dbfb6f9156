"""The short form of `make fuzz`: twenty thousand damaged inputs, seeded, for every parser."""

from __future__ import annotations

import pytest

from kvstore.errors import ProtocolError
from tests.fuzz.run import FuzzError, fuzz
from tests.fuzz.targets import TARGETS, Target

INPUTS = 20_000
SECONDS = 20.0


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_named_errors(name: str) -> None:
    target = TARGETS[name]()
    assert fuzz(target, seed=1, inputs_max=target.inputs_max, seconds_max=SECONDS) > target.inputs_max // 20


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_accepted(name: str) -> None:
    """Otherwise the fuzzer would only knock at the front door."""
    target = TARGETS[name]()
    for seed in target.seeds:
        target.parse(seed)
        assert target.mend is None or target.mend(seed) == seed


def test_a_parser_that_trips_is_found() -> None:
    def parse(data: bytes) -> None:
        if not data:
            raise ProtocolError("nothing there")
        if data[0] == 0xFF:
            raise IndexError("past the end")

    with pytest.raises(FuzzError, match="past the end"):
        fuzz(Target((b"\0" * 8,), parse, (ProtocolError,)), seed=1, inputs_max=INPUTS, seconds_max=SECONDS)
