"""Agents: a long chain of calls of tools, which now and then forks into agents that go on from the same context."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from kvstore.errors import SimulationError
from kvstore.limits import SESSION_CALLS_MAX
from kvstore.workload.block_keys import Text
from kvstore.workload.generators.settings import Setting, settings_of, tokens
from kvstore.workload.session import Call, Session, SessionKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

BRANCHING = {
    "shared_tokens": tokens(12_000, "tools and system prompt that all sessions begin with", 0),
    "task_tokens": tokens(2000, "mean of the task (geometric)"),
    "steps": Setting(20.0, 1.0, 10_000.0, "mean of the calls of the agent itself (geometric)"),
    "step_tokens": tokens(1500, "mean of a tool's result, which each further call adds (geometric)"),
    "output_tokens": tokens(200, "mean of each output (geometric)"),
    "think_s": Setting(5.0, 0.0, 1e6, "mean of a tool's time, from an output's end to the next call (exponential)"),
    "fork_share": Setting(0.05, 0.0, 1.0, "share of the agent's calls after which it forks"),
    "forks": Setting(3, 1, 1000, "agents that a fork begins, all at once", True),
    "fork_steps": Setting(5.0, 1.0, 10_000.0, "mean of the calls of each (geometric)"),
    "tokens_max": tokens(131_072, "no prompt with its output is longer"),
}


def branching_sessions(
    given: tuple[tuple[str, float], ...], block_tokens: int, rng: np.random.Generator
) -> Iterator[Session]:
    """Sessions, without end. An agent ends early when its next prompt and output would not fit into `tokens_max`.

    A first task that does not fit is cut.

    After a fork the agent goes on when that one of the forked which makes the most calls has ended; what they have
    found enters its context as a tool's result.

    Raises:
        SimulationError: a setting is unknown or out of its limits, or two contradict each other.
    """
    values = settings_of("branching", BRANCHING, given)
    if values["shared_tokens"] > values["tokens_max"] - 2:
        raise SimulationError(
            f"the workload 'branching': shared_tokens={values['shared_tokens']:g} leaves no room for a task within "
            f"tokens_max={values['tokens_max']:g}"
        )
    shared = Text(0, block_tokens)
    shared.grow(round(values["shared_tokens"]))
    # Texts are numbered from 1. A session has one, one for each forked agent that makes a call, and one in vain at most
    # for each of its own calls.
    return (_Session(rng, values, shared, 1 + number * 2 * SESSION_CALLS_MAX).calls() for number in count())


class _Session:
    """One session while it is being made."""

    def __init__(self, rng: np.random.Generator, values: Mapping[str, float], shared: Text, first_text: int) -> None:
        self._rng = rng
        self._values = values
        self._shared = shared
        self._next_text = first_text
        self._calls: list[Call] = []
        self._known = SessionKeys()

    def calls(self) -> Session:
        text = self._fork(self._shared)
        after: int | None = None
        for step in range(self._steps("steps")):
            called = self._call(text, "step_tokens" if step else "task_tokens", after)
            if called is None:
                break
            after = called
            if float(self._rng.random()) < self._values["fork_share"]:
                after = self._forks(text, after)
        return tuple(self._calls)

    def _forks(self, text: Text, after: int) -> int:
        """Several agents go on from a text; the last call of the longest of them."""
        last, most = after, 0
        for _ in range(int(self._values["forks"])):
            branch = self._fork(text)
            at, made = after, 0
            for _ in range(self._steps("fork_steps")):
                called = self._call(branch, "step_tokens", at)
                if called is None:
                    break
                at, made = called, made + 1
            if not made:
                break
            if made > most:
                last, most = at, made
        return last

    def _call(self, text: Text, added: str, after: int | None) -> int | None:
        """One more call; None if it would be too long, or there are too many."""
        prompt_tokens = text.tokens + self._drawn(added)
        output_tokens = self._drawn("output_tokens")
        wait_s = float(self._rng.exponential(self._values["think_s"])) if after is not None else 0.0
        is_too_long = prompt_tokens + output_tokens > self._values["tokens_max"]
        if self._calls and (is_too_long or len(self._calls) >= SESSION_CALLS_MAX):
            return None
        if is_too_long:  # a session makes a call in any case
            prompt_tokens = min(prompt_tokens, int(self._values["tokens_max"]) - 1)
            output_tokens = min(output_tokens, int(self._values["tokens_max"]) - prompt_tokens)
        text.grow(prompt_tokens - text.tokens)
        keys = text.keys
        text.grow(output_tokens)
        self._calls.append(self._known.add(Call(prompt_tokens, output_tokens, keys, text.keys, after, wait_s)))
        return len(self._calls) - 1

    def _fork(self, text: Text) -> Text:
        self._next_text += 1
        return text.fork(self._next_text - 1)

    def _drawn(self, name: str) -> int:
        return int(self._rng.geometric(1 / self._values[name]))

    def _steps(self, name: str) -> int:
        return min(self._drawn(name), SESSION_CALLS_MAX)
