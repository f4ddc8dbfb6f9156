"""What the adapter needs to know of a causal language model: its layers, and how to run a chunk."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from kvstore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""Names under which models, and their layers, take the cache; Mamba models use the second."""


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The list of the model's decoder layers, wherever it lies (`model.layers`, `backbone.layers` ...).

    Raises:
        UnsupportedModelError: no module list, or more than one at the same depth, has as many entries as
            the configuration has layers.
    """
    config = text_config(model)
    count = config.num_hidden_layers
    found: dict[int, list[tuple[str, torch.nn.ModuleList]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            found.setdefault(name.count("."), []).append((name, module))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no torch.nn.ModuleList of its {count} layers, so layer-wise export has "
            "nothing to attach to"
        )
    shallowest = found[min(found)]
    if len(shallowest) > 1:
        names = ", ".join(name for name, _ in shallowest)
        raise UnsupportedModelError(
            f"{type(model).__name__} has several lists of {count} modules ({names}); pass the text model alone"
        )
    return shallowest[0][1]


def text_config(model: torch.nn.Module) -> Any:
    """Configuration of the decoder."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward call's keyword arguments, None if it has none."""
    for name in CACHE_ARGUMENTS:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def _check_evaluates(model: torch.nn.Module) -> None:
    if model.training:
        raise UnsupportedModelError("the model is in training mode, where dropout makes caches random; call eval()")


class Decoder:
    """Runs a model over a chunk of one sequence, starting at any position of a cache.

    The model's own mode, threads and kernels are left as they are. Not for use by several threads at once.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.
        explicit_positions: tell the model each token's position. Otherwise it derives them, most models
            from the cache, but some count from 0 at each call, however much is cached (Bamba does).
    """

    def __init__(self, model: torch.nn.Module, *, explicit_positions: bool = True) -> None:
        _check_evaluates(model)
        parameters = inspect.signature(model.forward).parameters
        names = [name for name in CACHE_ARGUMENTS if name in parameters]
        if not names:
            raise UnsupportedModelError(
                f"{type(model).__name__}.forward takes neither {' nor '.join(CACHE_ARGUMENTS)}; "
                "a causal language model is needed"
            )
        self.model = model
        self._cache_argument = names[0]
        self._takes_positions = explicit_positions and "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self.device = next(model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(text_config(self.model).vocab_size)

    @torch.no_grad()
    def run(self, token_ids: torch.Tensor, cache: Any, start: int, *, every_token: bool = False) -> torch.Tensor:
        """Compute tokens [`start`, `start + n`) and append them to the cache.

        Args:
            token_ids: `[n]`, on any device.
            cache: a `DynamicCache` that has seen exactly `start` tokens.
            start: position of the first.
            every_token: return the logits after each of the tokens.

        Returns:
            The logits after the last token, `[vocabulary]`, or after each, `[n, vocabulary]`, on the
            model's device, in its type. The two need not agree bit for bit.
        """
        _check_evaluates(self.model)
        ids = token_ids.to(self.device).view(1, -1)
        arguments: dict[str, Any] = {self._cache_argument: cache, "use_cache": True}
        if self._takes_positions:
            arguments["position_ids"] = torch.arange(start, start + ids.shape[1], device=self.device).view(1, -1)
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = 0 if every_token else 1
        logits: torch.Tensor = self.model(input_ids=ids, **arguments).logits
        return logits[0] if every_token else logits[0, -1]

    def continue_prompt(
        self,
        cache: Any,
        token_ids: Sequence[int],
        start: int,
        chunk_tokens: int,
        decoded_tokens: int,
        *,
        every_token: bool = False,
    ) -> list[torch.Tensor]:
        """Compute the rest of a prompt chunk by chunk, then decode the likeliest tokens.

        Args:
            cache: has seen the first `start` tokens.
            token_ids: the whole prompt.
            start: a multiple of `chunk_tokens`.
            chunk_tokens: tokens of a chunk; the last may be shorter.
            decoded_tokens: how many tokens to decode.
            every_token: as for `run`.

        Returns:
            What `run` gave for each chunk, then for each decoded token.
        """
        ids = torch.as_tensor(token_ids)
        rows = [
            self.run(ids[begin : begin + chunk_tokens], cache, begin, every_token=every_token)
            for begin in range(start, len(ids), chunk_tokens)
        ]
        for position in range(len(ids), len(ids) + decoded_tokens):
            likeliest = rows[-1].view(-1, rows[-1].shape[-1])[-1].argmax().view(1)
            rows.append(self.run(likeliest, cache, position, every_token=every_token))
        return rows
