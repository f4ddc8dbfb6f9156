"""Fuzzing, seeded: the same seed tries the same inputs."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from tests.fuzz.mutate import mutate

if TYPE_CHECKING:
    from tests.fuzz.targets import Target


class FuzzError(AssertionError):
    """A parser did something else than accept or refuse by name; the message has the input."""


def fuzz(target: Target, *, seed: int, inputs_max: int, seconds_max: float) -> int:
    """Try mutated inputs until one limit is reached; how many were tried.

    Raises:
        FuzzError: the parser raised what it must not.
    """
    generator = random.Random(seed)
    end_s = time.monotonic() + seconds_max
    for number in range(inputs_max):
        if time.monotonic() > end_s:
            return number
        data = mutate(generator, target.seeds)
        if target.mend is not None and generator.random() < 0.5:
            data = target.mend(data)
        try:
            target.parse(data)
        except target.refusals:
            continue
        except Exception as error:
            raise FuzzError(f"input {number} of seed {seed} raised {error!r}: {data.hex()}") from error
    return inputs_max
