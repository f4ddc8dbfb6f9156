"""The prompts that kill tests write: few, long and related, so that memory is short and prefixes are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

FAMILIES = 6
LENGTHS = (30, 64, 100)
JOINT_DEADLINE_S = 2.0


def ids_of(family: int, length: int) -> list[int]:
    return [family, *range(1, length)]


def prompt_of(generator: random.Random) -> list[int]:
    """One of them."""
    return ids_of(generator.randrange(FAMILIES), generator.choice(LENGTHS))


def every_prompt() -> list[list[int]]:
    return [ids_of(family, length) for family in range(FAMILIES) for length in LENGTHS]


def joint_prompt(seed: int, attempt: int) -> list[int]:
    """What the parties of one joint commit write."""
    return [1000 + seed, attempt % 16, *range(1, 50)]
