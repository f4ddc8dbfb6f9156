"""Decoding on from a cache: choosing tokens, and the logits that travel with a hand-over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from kvstore.adapters.transformers.decoder import Decoder

_SEED_STEP = 0x9E3779B97F4A7C15
"""The golden ratio in 64 bits, so that neighbouring seeds share no draws."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, one is drawn from `softmax(logits / temperature)`.
        seed: of the draws, which happen on the CPU, so that devices draw alike. Draw i of two runs with
            one seed is the same, so a hand-over continues as one process would.
        stop_ids: token ids that end the text; the one that did is its last token.
    """

    temperature: float = 0.0
    seed: int = 0
    stop_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}")

    def choose(self, logits: torch.Tensor, position: int) -> int:
        """The token at `position` (counted from the start of the prompt), from logits `[vocabulary]`."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        generator = torch.Generator().manual_seed((self.seed * _SEED_STEP + position) % (1 << 63))
        weights = torch.softmax(logits.detach().cpu().float() / self.temperature, dim=-1)
        return int(torch.multinomial(weights, 1, generator=generator))


@dataclass(frozen=True)
class Step:
    """One decoded token.

    Attributes:
        token: its id.
        logits: what it was chosen from, `[vocabulary]`; None for a handed-over token without logits.
    """

    token: int
    logits: torch.Tensor | None


def decode(
    decoder: Decoder, cache: Any, first: Step, prompt_tokens: int, tokens_max: int, sampling: Sampling
) -> Iterator[Step]:
    """The first token, then up to `tokens_max` - 1 more, each as soon as it is computed.

    Args:
        decoder: the model.
        cache: has seen the prompt, and not the first token.
        first: the token that follows the prompt.
        prompt_tokens: length of the prompt.
        tokens_max: the most tokens, the first included.
        sampling: how each is chosen.
    """
    step, position = first, prompt_tokens
    for count in range(1, tokens_max + 1):
        yield step
        if count == tokens_max or step.token in sampling.stop_ids:
            return
        logits = decoder.run(torch.tensor([step.token]), cache, position)
        position += 1
        step = Step(sampling.choose(logits, position), logits)


def pack_logits(logits: torch.Tensor) -> bytes:
    """Logits as little-endian float32, which holds bfloat16 and float16 exactly."""
    return logits.detach().cpu().float().numpy().astype("<f4", copy=False).tobytes()


def unpack_logits(payload: bytes, vocabulary: int) -> torch.Tensor | None:
    """What `pack_logits` made; None for an empty payload.

    Raises:
        ProtocolError: the payload is not that many logits.
    """
    if not payload:
        return None
    if len(payload) != 4 * vocabulary:
        raise ProtocolError(
            f"the hand-over carries {len(payload)} bytes of logits, expected {4 * vocabulary} for a vocabulary of "
            f"{vocabulary}; both sides need the same model"
        )
    return torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32))
