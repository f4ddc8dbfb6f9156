"""Small model specs, one of each kind, and cache contents that check themselves.

    spec = hybrid()
    prompt = store.prompt(ids)
    with store.write(prompt) as writer:
        put_all(writer)
        writer.commit()
    with store.read(store.match([*ids, 0])) as lease:
        check_lease(lease, prompt)

Every value is computed from the tokens that it depends on, the layer, the tensor and the row. So a reader
knows what it must find without remembering what was written, and bytes of another prefix, tenant, layer,
row or length are noticed. Nothing here needs pytest.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.spec.coverage import mask_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.pool import Prompt
    from kvstore.spec import Shard
    from kvstore.store import Lease, Writer


def dense(block_tokens: int = 16, *, weights: str = "seed 0") -> ModelSpec:
    """Grouped-query attention in every layer."""
    return ModelSpec("test-dense", weights, block_tokens, (_attention("attention", (0, 1, 2)),))


def hybrid(block_tokens: int = 16, *, weights: str = "seed 0") -> ModelSpec:
    """Attention, recurrent and convolution states whose parts split separately, and a sliding window."""
    return ModelSpec(
        "test-hybrid",
        weights,
        block_tokens,
        (_attention("attention", (1, 3)), _state("state", (0, 2)), _window((4,), 7)),
    )


def pure_state(block_tokens: int = 16, *, weights: str = "seed 0") -> ModelSpec:
    """No attention at all: nodes without records lead to the states."""
    return ModelSpec("test-state", weights, block_tokens, (_state("state", (0, 1)),))


def windowed(block_tokens: int = 16, *, weights: str = "seed 0") -> ModelSpec:
    """Attention beside a sliding window that is longer than a block."""
    return ModelSpec(
        "test-windowed", weights, block_tokens, (_attention("attention", (0, 2)), _window((1, 3), block_tokens + 3))
    )


def latent(block_tokens: int = 16, *, weights: str = "seed 0") -> ModelSpec:
    """Latent attention, of which every worker holds all, beside a state that splits."""
    tensors = (
        TensorSpec("latent", DType.BFLOAT16, (Segment("latent", 1, 1, replicated=True),), (24,), True),
        TensorSpec("rope", DType.BFLOAT16, (Segment("latent", 1, 1, replicated=True),), (8,), True),
    )
    groups = (CacheGroup("latent", ReuseRule.ATTENTION, (0, 2), tensors), _state("state", (1,)))
    return ModelSpec("test-latent", weights, block_tokens, groups)


def spans(block_tokens: int = 2, *, weights: str = "seed 0") -> ModelSpec:
    """Layers so wide that each group is cut into several spans, hence several records at each node."""
    wide = TensorSpec("keys", DType.UINT8, (Segment("heads", 2, 1),), (768 << 10,), True)
    deep = TensorSpec("recurrent", DType.UINT8, (Segment("heads", 2, 1),), (5 << 19,), False)
    attention = CacheGroup("attention", ReuseRule.ATTENTION, (0, 1, 2), (wide,))
    state = CacheGroup("state", ReuseRule.STATE, (3, 4), (deep,))
    spec = ModelSpec("test-spans", weights, block_tokens, (attention, state))
    assert all(len(group_spans) > 1 for group_spans in spec.spans)
    return spec


def _attention(name: str, layers: tuple[int, ...]) -> CacheGroup:
    heads = (Segment("heads", 2, 1),)
    tensors = tuple(TensorSpec(tensor, DType.FLOAT32, heads, (4,), True) for tensor in ("keys", "values"))
    return CacheGroup(name, ReuseRule.ATTENTION, layers, tensors)


def _state(name: str, layers: tuple[int, ...]) -> CacheGroup:
    conv = TensorSpec("conv", DType.BFLOAT16, (Segment("query", 2, 4), Segment("value", 4, 2)), (3,), False)
    recurrent = TensorSpec("recurrent", DType.FLOAT32, (Segment("heads", 4, 1),), (2, 3), False)
    return CacheGroup(name, ReuseRule.STATE, layers, (conv, recurrent))


def _window(layers: tuple[int, ...], window_tokens: int) -> CacheGroup:
    heads = (Segment("heads", 2, 1),)
    tensors = tuple(TensorSpec(f"window_{part}", DType.FLOAT16, heads, (4,), True) for part in ("keys", "values"))
    return CacheGroup("window", ReuseRule.STATE, layers, tensors, window_tokens)


def token_seeds(prompt: Prompt) -> npt.NDArray[np.uint64]:
    """One number per token that depends on it, all before it, which of them are held, and what all are cached under."""
    extras = {extra.position: b"" for extra in prompt.extras}
    for extra in sorted(prompt.extras, key=lambda extra: (extra.position, extra.data)):
        extras[extra.position] += len(extra.data).to_bytes(4, "little") + extra.data
    digest = hashlib.blake2b(prompt.path.root, digest_size=16)
    seeds = []
    for position, token_id in enumerate(prompt.token_ids.tolist()):
        digest.update(token_id.to_bytes(4, "little") + extras.get(position, b"") + _held_at(prompt, position))
        seeds.append(int.from_bytes(digest.copy().digest()[:8], "little"))
    return np.array(seeds, np.uint64)


def _held_at(prompt: Prompt, position: int) -> bytes:
    """Which attention layers hold a token, if not all do."""
    block, at = divmod(position, prompt.path.block_tokens)
    mask = prompt.masks.get(block)
    if mask is None:
        return b""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    held = bits.reshape(-1, mask_bytes(prompt.path.block_tokens) * 8)[:, at]
    return b"" if held.all() else held.tobytes()


def token_values(
    spec: ModelSpec, prompt: Prompt, layer: int, name: str, start: int, stop: int, shard: Shard = WHOLE
) -> npt.NDArray[Any]:
    """What an attention layer must hold of tokens `[start, stop)`: `[rows, tokens, *inner]`, storage type."""
    tensor = _tensor(spec, layer, name)
    seeds = token_seeds(prompt)[start:stop]
    rows = _rows(tensor, shard)
    values = _mix(seeds[None, :, None] ^ _places(layer, name, tensor)[rows][:, None, :])
    return _stored(values, tensor, (len(rows), stop - start, *tensor.inner))


def state_values(
    spec: ModelSpec, prompt: Prompt, layer: int, name: str, at: int, shard: Shard = WHOLE
) -> npt.NDArray[Any]:
    """What a state must hold after `at` tokens: `[rows, *inner]`, or of a window `[rows, valid, *inner]`."""
    group = spec.groups[spec.group_index(layer, name)]
    if group.window_tokens is not None:
        return token_values(spec, prompt, layer, name, max(0, at - group.window_tokens), at, shard)
    tensor = _tensor(spec, layer, name)
    rows = _rows(tensor, shard)
    values = _mix(token_seeds(prompt)[at - 1] ^ _places(layer, name, tensor)[rows])
    return _stored(values, tensor, (len(rows), *tensor.inner))


def _tensor(spec: ModelSpec, layer: int, name: str) -> TensorSpec:
    group = spec.groups[spec.group_index(layer, name)]
    return next(tensor for tensor in group.tensors if tensor.name == name)


def _rows(tensor: TensorSpec, shard: Shard) -> npt.NDArray[np.int64]:
    """Rows of the whole tensor that a worker holds."""
    rows: list[int] = []
    first = 0
    for segment in tensor.segments:
        for unit in shard.units_of(segment):
            rows.extend(range(first + unit * segment.unit_rows, first + (unit + 1) * segment.unit_rows))
        first += segment.rows
    return np.array(rows, np.int64)


@lru_cache(maxsize=64)
def _places(layer: int, name: str, tensor: TensorSpec) -> npt.NDArray[np.uint64]:
    """A number per row and element: `[rows, words]`."""
    words = -(-tensor.row_bytes // 8)
    seed = int.from_bytes(hashlib.blake2b(f"{layer} {name}".encode(), digest_size=8).digest(), "little")
    return _mix(np.arange(tensor.rows * words, dtype=np.uint64).reshape(tensor.rows, words) + np.uint64(seed >> 8))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _stored(words: npt.NDArray[np.uint64], tensor: TensorSpec, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    values = np.ascontiguousarray(words).view(np.uint8)[..., : tensor.row_bytes]
    return np.ascontiguousarray(values).view(tensor.dtype.storage).reshape(shape)


def tensors_of(spec: ModelSpec, rule: ReuseRule) -> list[tuple[int, tuple[str, ...]]]:
    """(layer, tensor names) of every group of one rule."""
    return [
        (layer, tuple(tensor.name for tensor in group.tensors))
        for group in spec.groups
        if group.rule is rule
        for layer in group.layers
    ]


def put_tokens(writer: Writer, start: int, stop: int, *, layer: int | None = None) -> None:
    """Put tokens `[start, stop)` of one attention layer, or of all: those that the writer is to hold."""
    spec, shard = writer.spec, writer.shard
    for number, names in tensors_of(spec, ReuseRule.ATTENTION):
        if layer in (None, number):
            held = slice(None) if writer.coverage is None else writer.coverage.mask(number)[start:stop]
            values: dict[str, Any] = {
                name: token_values(spec, writer.prompt, number, name, start, stop, shard)[:, held] for name in names
            }
            writer.put(number, tokens=slice(start, stop), **values)


def put_states(writer: Writer, at: int, *, layer: int | None = None) -> None:
    """Put the states after `at` tokens of one layer, or of all."""
    spec, shard = writer.spec, writer.shard
    for number, names in tensors_of(spec, ReuseRule.STATE):
        if layer in (None, number):
            values: dict[str, Any] = {
                name: state_values(spec, writer.prompt, number, name, at, shard) for name in names
            }
            writer.put_state(number, at=at, **values)


def put_all(writer: Writer, *, start: int = 0) -> None:
    """Put everything that the writer wants from token `start` on."""
    if start < len(writer.prompt):
        put_tokens(writer, start, len(writer.prompt))
    for at in writer.resume_at:
        put_states(writer, at)


def check_lease(lease: Lease, prompt: Prompt) -> None:
    """Read everything and compare it with what it must be: zeros where a layer does not hold a token.

    Raises:
        AssertionError: some value is not that of this prompt's prefix.
    """
    masks = lease.path.masks
    prompt = prompt.exact.with_masks(masks) if masks else prompt.exact
    for group in lease.spec.groups:
        for layer in group.layers:
            for tensor in group.tensors:
                found = lease.layer(layer).read(tensor.name)
                if group.rule is ReuseRule.ATTENTION:
                    expected = token_values(lease.spec, prompt, layer, tensor.name, 0, lease.tokens, lease.shard)
                    expected[:, ~lease.layer(layer).mask] = 0
                else:
                    expected = state_values(lease.spec, prompt, layer, tensor.name, lease.tokens, lease.shard)
                what = f"{tensor.name!r} of layer {layer} after {lease.tokens} tokens"
                assert found.shape == expected.shape, f"{what} has shape {found.shape}, not {expected.shape}"
                assert found.tobytes() == expected.tobytes(), f"{what} is not what belongs to this prefix"
