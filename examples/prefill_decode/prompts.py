"""The three prompts of a run, and where the first one's states are kept."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from .arguments import CHUNKS_MIN
from .child import DemoError
from .values import Prompt

if TYPE_CHECKING:
    from .arguments import Options

NAMES = ("first", "shares much", "shares less")
QUESTIONS = (
    "In two sentences, what is this text?",
    "Name three things that this text allows.",
    "Who wrote this text, and for whom?",
)


def checkpoint_lengths(prompt_tokens: int, chunk_tokens: int) -> tuple[int, ...]:
    """Where the first prompt's states are stored besides its end: about halfway, and after its last whole chunk.

    The store suggests lengths by itself; these are named so that the next prompts fall between them.
    """
    halfway = max(1, round(prompt_tokens / chunk_tokens / 2)) * chunk_tokens
    last = (prompt_tokens - 1) // chunk_tokens * chunk_tokens
    return (halfway, last)


def make_prompts(options: Options, vocabulary: int) -> tuple[Prompt, ...]:
    """The first prompt; one that leaves it after the last checkpoint; one that leaves it before."""
    lists = _from_text(options) if options.is_trained else _random(options, vocabulary)
    first = lists[0]
    return tuple(
        Prompt(name, tuple(ids), _shared(first, ids), question if options.is_trained else None)
        for name, ids, question in zip(NAMES, lists, QUESTIONS, strict=True)
    )


def _shared(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _branches(prompt_tokens: int, chunk_tokens: int) -> tuple[int, int]:
    """Lengths at which the second and the third prompt leave the first."""
    last = checkpoint_lengths(prompt_tokens, chunk_tokens)[-1]
    return max(last, prompt_tokens - prompt_tokens // 32), last - chunk_tokens // 2


def _random(options: Options, vocabulary: int) -> list[list[int]]:
    generator = np.random.default_rng(options.seed)
    count = options.prompt_tokens
    first = generator.integers(0, vocabulary, count).tolist()
    late, early = _branches(count, options.chunk_tokens)
    new_tokens = max(count // 16, 1)
    second = first[:late] + generator.integers(0, vocabulary, new_tokens).tolist()
    third = first[:early] + generator.integers(0, vocabulary, count - early).tolist()
    return [first, second, third]


def _from_text(options: Options) -> list[list[int]]:
    """A question about a text, another one about the same, and one about less of it."""
    from .trained_model import load_tokenizer

    tokenizer = load_tokenizer()
    text_ids = tokenizer(options.text.read_text(errors="replace"), add_special_tokens=False)["input_ids"]

    def ask(tokens: int, question: str) -> list[int]:
        content = f"{tokenizer.decode(text_ids[:tokens])}\n\n{question}"
        messages = [{"role": "user", "content": content}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    frame_tokens = len(ask(0, QUESTIONS[0]))
    whole = min(options.prompt_tokens - frame_tokens, len(text_ids))
    first = ask(whole, QUESTIONS[0])
    least = CHUNKS_MIN * options.chunk_tokens
    if len(first) <= least:
        raise DemoError(
            f"the prompt with {options.text} has {len(first)} tokens, and more than {CHUNKS_MIN} chunks of "
            f"{options.chunk_tokens} are needed; give a longer --text, or a smaller --chunk-tokens"
        )
    early = _branches(len(first), options.chunk_tokens)[1]
    return [first, ask(whole, QUESTIONS[1]), ask(early - frame_tokens, QUESTIONS[2])]
