"""Conversations: each prompt is all that was said before and a new message."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from kvstore.errors import SimulationError
from kvstore.limits import SESSION_CALLS_MAX
from kvstore.workload.block_keys import Text
from kvstore.workload.generators.settings import FIRST_PROMPT, Setting, prompt_lengths, settings_of, tokens
from kvstore.workload.session import Call, Session, SessionKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

    from kvstore.schedule.planning.lengths import TruncatedLogNormal

MULTITURN = {
    **FIRST_PROMPT,
    "mu": Setting(8.0, 0.0, 20.0, "mean of the logarithm of the first message's tokens, before truncation"),
    "shared_tokens": tokens(1024, "system prompt that all conversations begin with", 0),
    "turns": Setting(5.0, 1.0, 10_000.0, "mean of the prompts of a conversation (geometric)"),
    "message_tokens": tokens(500, "mean of each further message (geometric)"),
    "output_tokens": tokens(400, "mean of each answer (geometric)"),
    "think_s": Setting(30.0, 0.0, 1e6, "mean from an answer's end to the next message (exponential)"),
}


def multiturn_sessions(
    given: tuple[tuple[str, float], ...], block_tokens: int, rng: np.random.Generator
) -> Iterator[Session]:
    """Conversations, without end. One ends early when its next prompt and answer would not fit into `tokens_max`.

    Raises:
        SimulationError: a setting is unknown or out of its limits, or two contradict each other.
    """
    values = settings_of("multiturn", MULTITURN, given)
    # The first prompt has the system prompt, too, and is no longer than the others may be.
    first = {**values, "tokens_max": values["tokens_max"] - values["shared_tokens"]}
    if first["tokens_max"] < values["tokens_min"]:
        raise SimulationError(
            f"the workload 'multiturn': shared_tokens={values['shared_tokens']:g} leaves no room for a message of "
            f"tokens_min={values['tokens_min']:g} within tokens_max={values['tokens_max']:g}"
        )
    lengths = prompt_lengths("multiturn", first)
    shared = Text(0, block_tokens)
    shared.grow(round(values["shared_tokens"]))
    return (_session(rng, values, lengths, shared.fork(number)) for number in count(1))


def _session(rng: np.random.Generator, values: Mapping[str, float], lengths: TruncatedLogNormal, text: Text) -> Session:
    turns = min(int(rng.geometric(1 / values["turns"])), SESSION_CALLS_MAX)
    calls: list[Call] = []
    known = SessionKeys()
    text.grow(max(round(lengths.quantile(float(rng.random()))), 1))
    for turn in range(turns):
        if turn:
            text.grow(int(rng.geometric(1 / values["message_tokens"])))
        output_tokens = int(rng.geometric(1 / values["output_tokens"]))
        wait_s = float(rng.exponential(values["think_s"])) if turn else 0.0
        if turn and text.tokens + output_tokens > values["tokens_max"]:
            break
        prompt_tokens, keys = text.tokens, text.keys
        text.grow(output_tokens)
        after = turn - 1 if turn else None
        calls.append(known.add(Call(prompt_tokens, output_tokens, keys, text.keys, after, wait_s)))
    return tuple(calls)
