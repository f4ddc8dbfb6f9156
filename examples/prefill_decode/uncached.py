"""The model alone, without the library: what everything is compared with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from .values import Decoded, Uncached

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def run_uncached(
    model: Any, token_ids: Sequence[int], chunk_tokens: int, decode_tokens: int, progress: Callable[[int], None]
) -> Uncached:
    """Prefill in chunks counted from token 0, then decode greedily."""
    started_s = time.monotonic()
    cache = DynamicCache(config=model.config)
    for start in range(0, len(token_ids), chunk_tokens):
        logits = forward(model, token_ids[start : start + chunk_tokens], cache, start)
        progress(min(start + chunk_tokens, len(token_ids)))
    first = int(logits.argmax())
    prefill_s = time.monotonic() - started_s
    return Uncached(decode_greedily(model, cache, first, logits, len(token_ids), decode_tokens), prefill_s)


def decode_greedily(
    model: Any, cache: Any, first: int, first_logits: torch.Tensor, position: int, decode_tokens: int
) -> Decoded:
    """Decode on from a cache that has seen `position` tokens; `first` follows these."""
    tokens, rows = [first], [first_logits]
    while len(tokens) < decode_tokens:
        rows.append(forward(model, tokens[-1:], cache, position))
        tokens.append(int(rows[-1].argmax()))
        position += 1
    return Decoded(tuple(tokens), torch.stack(rows).float().numpy())


@torch.no_grad()
def forward(model: Any, token_ids: Sequence[int], cache: Any, start: int) -> torch.Tensor:
    """Logits after the last of these tokens, which begin at position `start`."""
    # Some models count positions from 0 at each call, however much is cached, so they are given.
    positions = torch.arange(start, start + len(token_ids)).view(1, -1)
    ids = torch.tensor([token_ids])
    output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1]
    return logits
