"""Coverage: which tokens of a prompt each attention layer holds, where a sparse or pruned prefill leaves some out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import SpecError
from kvstore.limits import LAYERS_MAX, PROMPT_TOKENS_MAX
from kvstore.spec.group import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from kvstore.spec.model import ModelSpec

    Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Coverage:
    """Which of the first `tokens` tokens of a prompt each attention layer holds. Immutable; any thread.

    Two coverages that mean the same are equal: layers that hold every token are not listed. States and windows are
    whole in any case.

    Attributes:
        tokens: length of what it speaks of.
        layers: model layer number and its mask, ascending: bit i of the mask, counted from the lowest bit of the first
            byte, says whether token i is held; bits past `tokens` are 0.

    Raises:
        SpecError: not that form.
    """

    tokens: int
    layers: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or not 1 <= self.tokens <= PROMPT_TOKENS_MAX:
            raise SpecError(f"a coverage of {self.tokens!r} tokens; allowed are 1 to {PROMPT_TOKENS_MAX}")
        numbers = [layer for layer, _ in self.layers]
        if len(numbers) > LAYERS_MAX or numbers != sorted(set(numbers)) or (numbers and numbers[0] < 0):
            raise SpecError(f"a coverage lists layers in ascending order, each once and at most {LAYERS_MAX}")
        for layer, mask in self.layers:
            if len(mask) != mask_bytes(self.tokens):
                raise SpecError(f"layer {layer} has a mask of {len(mask)} bytes for {self.tokens} tokens")
            held = _unpacked(mask)
            if held[self.tokens :].any() or held[: self.tokens].all():
                raise SpecError(f"layer {layer} holds every token, or tokens past {self.tokens}; use Coverage.of_masks")

    @classmethod
    def of_masks(cls, masks: Mapping[int, Any]) -> Coverage:
        """From one array of booleans per layer, each `[tokens]`; layers that are not named hold every token.

        Raises:
            SpecError: no layer, no booleans, or masks of different lengths.
        """
        arrays = {layer: np.asarray(mask) for layer, mask in masks.items()}
        if not arrays or any(array.ndim != 1 or array.dtype != np.bool_ for array in arrays.values()):
            raise SpecError("a coverage is made of one array of booleans per layer, each of shape [tokens]")
        lengths = {array.size for array in arrays.values()}
        if len(lengths) != 1:
            raise SpecError(f"the masks of a coverage have different lengths: {sorted(lengths)}; give each [tokens]")
        return cls(
            lengths.pop(),
            tuple((layer, _packed(mask).tobytes()) for layer, mask in sorted(arrays.items()) if not mask.all()),
        )

    @classmethod
    def of_ranges(cls, tokens: int, ranges: Mapping[int, Iterable[tuple[int, int]]]) -> Coverage:
        """From ranges `[start, stop)` of the tokens that layers hold; layers that are not named hold every token.

        Raises:
            SpecError: a range that is empty or outside of the tokens, or an impossible number of these.
        """
        if not isinstance(tokens, int) or not 1 <= tokens <= PROMPT_TOKENS_MAX:
            raise SpecError(f"a coverage of {tokens!r} tokens; allowed are 1 to {PROMPT_TOKENS_MAX}")
        masks = {}
        for layer, held in ranges.items():
            mask = masks[layer] = np.zeros(tokens, np.bool_)
            for start, stop in held:
                if not 0 <= start < stop <= tokens:
                    raise SpecError(f"layer {layer}: tokens {start} to {stop} are no range within {tokens} tokens")
                mask[start:stop] = True
        return cls.of_masks(masks) if masks else cls(tokens)

    @property
    def is_all(self) -> bool:
        """Whether every layer holds every token."""
        return not self.layers

    @cached_property
    def _masks(self) -> dict[int, Mask]:
        return {layer: _unpacked(mask)[: self.tokens] for layer, mask in self.layers}

    def mask(self, layer: int) -> Mask:
        """Whether a layer holds each token, `[tokens]`."""
        mask = self._masks.get(layer)
        return np.ones(self.tokens, np.bool_) if mask is None else mask.copy()

    def first(self, tokens: int) -> Coverage:
        """Of a prefix."""
        return Coverage.of_masks({layer: mask[:tokens] for layer, mask in self._masks.items()} or {0: _all(tokens)})

    def followed_by(self, other: Coverage) -> Coverage:
        """Of these tokens and `other`'s after them: for a prompt that goes on where another one ended."""
        layers = {layer for layer, _ in (*self.layers, *other.layers)}
        joined = {layer: np.concatenate((self.mask(layer), other.mask(layer))) for layer in layers}
        return Coverage.of_masks(joined or {0: _all(self.tokens + other.tokens)})

    def check(self, spec: ModelSpec, tokens: int) -> None:
        """Raises `SpecError` unless it speaks of so many tokens and of attention layers of the spec only."""
        if self.tokens != tokens:
            raise SpecError(f"the coverage is of {self.tokens} tokens, the prompt has {tokens}; give all of them")
        strays = {layer for layer, _ in self.layers}.difference(layer for _, layer in attention_layers(spec))
        if strays:
            raise SpecError(f"layer {min(strays)} has no attention cache; states and windows are always whole")

    def block_masks(self, spec: ModelSpec) -> list[bytes | None]:
        """The mask of each block, a tail's last; None where every layer holds all of it. See `docs/keys.md`."""
        block = spec.block_tokens
        blocks = -(-self.tokens // block)
        layers = attention_layers(spec)
        held = np.ones((len(layers), blocks * block), np.bool_)
        held[:, self.tokens :] = False
        for row, (_, layer) in enumerate(layers):
            if layer in self._masks:
                held[row, : self.tokens] = self._masks[layer]
        by_block = held.reshape(len(layers), blocks, block)
        packed = np.packbits(by_block, axis=2, bitorder="little").transpose(1, 0, 2)
        sizes = [block] * (blocks - 1) + [self.tokens - (blocks - 1) * block]
        return [
            None if by_block[:, number, :size].all() else packed[number].tobytes() for number, size in enumerate(sizes)
        ]

    @classmethod
    def of_blocks(cls, spec: ModelSpec, tokens: int, masks: Mapping[int, bytes]) -> Coverage:
        """The inverse of `block_masks`: from the masks of the blocks that are not whole, by number."""
        block = spec.block_tokens
        layers = attention_layers(spec)
        held = np.ones((len(layers), -(-tokens // block), block), np.bool_)
        for number, mask in masks.items():
            held[:, number] = unpack_block(mask, len(layers), block)
        flat = held.reshape(len(layers), -1)[:, :tokens]
        by_layer = {layer: flat[row] for row, (_, layer) in enumerate(layers)}
        return cls.of_masks(by_layer or {0: _all(tokens)})


def mask_bytes(tokens: int) -> int:
    """Bytes of one layer's mask."""
    return -(-tokens // 8)


def attention_layers(spec: ModelSpec) -> list[tuple[int, int]]:
    """(group, layer) of every attention layer, in the order in which a block's mask lists them."""
    return [
        (index, layer)
        for index, group in enumerate(spec.groups)
        if group.rule is ReuseRule.ATTENTION
        for layer in group.layers
    ]


def block_mask_bytes(spec: ModelSpec) -> int:
    """Bytes of one block's mask."""
    return len(attention_layers(spec)) * mask_bytes(spec.block_tokens)


def is_block_mask(spec: ModelSpec, mask: bytes, tokens: int) -> bool:
    """Whether these bytes are the mask of a block of so many tokens: the right size, no stray bits, and not whole."""
    if len(mask) != block_mask_bytes(spec):
        return False
    held = unpack_block(mask, len(attention_layers(spec)), mask_bytes(spec.block_tokens) * 8)
    return not held[:, tokens:].any() and not held[:, :tokens].all()


def unpack_block(mask: bytes, layers: int, tokens: int) -> Mask:
    """Whether each layer holds each token of a block, `[layers, tokens]`."""
    return _unpacked(mask).reshape(layers, -1)[:, :tokens]


def first_tokens(mask: bytes, block_tokens: int, tokens: int) -> bytes | None:
    """A block's mask cut to its first tokens; None if every layer holds these."""
    held = _unpacked(mask).reshape(-1, mask_bytes(block_tokens) * 8).copy()
    held[:, tokens:] = False
    return None if held[:, :tokens].all() else np.packbits(held, axis=1, bitorder="little").tobytes()


def span_mask(spec: ModelSpec, mask: bytes, group: int, span: int) -> bytes:
    """The part of a block's mask that concerns one layer span: what the coverage column of its record holds."""
    layers = spec.spans[group][span].layers
    first = attention_layers(spec).index((group, layers[0]))
    size = mask_bytes(spec.block_tokens)
    return mask[first * size : (first + len(layers)) * size]


def _packed(mask: Mask) -> npt.NDArray[np.uint8]:
    return np.packbits(mask, bitorder="little")


def _unpacked(mask: bytes) -> Mask:
    return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(np.bool_)


def _all(tokens: int) -> Mask:
    return np.ones(tokens, np.bool_)
