"""Independent prompts of log-normal length, as in the paper's case study."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from kvstore.keys import KEY_BYTES
from kvstore.workload.block_keys import Text
from kvstore.workload.generators.settings import FIRST_PROMPT, prompt_lengths, settings_of, tokens
from kvstore.workload.session import Call, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

LOGNORMAL = {
    **FIRST_PROMPT,
    "output_tokens": tokens(1024, "output of every request"),
    "shared_tokens": tokens(0, "that all prompts begin with, as far as they are long enough", 0),
}


def lognormal_sessions(
    given: tuple[tuple[str, float], ...], block_tokens: int, rng: np.random.Generator
) -> Iterator[Session]:
    """Sessions of one call, without end.

    Raises:
        SimulationError: a setting is unknown or out of its limits.
    """
    values = settings_of("lognormal", LOGNORMAL, given)
    lengths = prompt_lengths("lognormal", values)
    output_tokens = round(values["output_tokens"])
    shared = Text(0, block_tokens)
    shared.grow(round(values["shared_tokens"]))
    return _sessions(rng, lengths.quantile, output_tokens, shared, block_tokens)


def _sessions(
    rng: np.random.Generator, length_at: Callable[[float], float], output_tokens: int, shared: Text, block_tokens: int
) -> Iterator[Session]:
    for number in count(1):
        prompt_tokens = max(round(length_at(float(rng.random()))), 1)
        text = shared.fork(number, prompt_tokens)
        text.grow(prompt_tokens - text.tokens + output_tokens)
        keys = text.keys[: prompt_tokens // block_tokens * KEY_BYTES]
        yield (Call(prompt_tokens, output_tokens, keys, text.keys),)
