"""An engine that lays its cache out as vLLM does, and reads and writes it as vLLM's kernels do, by plain loops.

Its specs have the names and attributes of vLLM's. Nothing here uses what is tested: which rows a tensor-parallel rank
holds, where a token lies in a page, and which page holds a state are said once more.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore.testing.specs import state_values, token_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from kvstore.pool import Prompt
    from kvstore.spec import ModelSpec

NULL_PAGE = 0


class Quantization(enum.Enum):
    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2


class Mechanism(enum.Enum):
    MAMBA1 = 1
    MAMBA2 = 2
    SHORT_CONV = 3
    LINEAR = 4
    GDN_ATTN = 5
    CUSTOM = 6


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: torch.dtype = torch.float32
    kv_quant_mode: Quantization = Quantization.NONE
    page_size_padded: int | None = None
    num_head_slots: int | None = None
    state_content_bytes: int | None = None
    tokens_per_state: int = 1
    max_tp_shards: int | None = None
    non_causal: bool = False
    sliding_window: int | None = None

    @property
    def content_bytes(self) -> int:
        return self.state_content_bytes or (self.head_size + self.head_size_v) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.num_kv_heads * self.block_size * self.content_bytes


@dataclass(frozen=True, kw_only=True)
class MLAAttentionSpec(FullAttentionSpec):
    head_size_v: int = 0
    max_tp_shards: int | None = 1
    cache_dtype_str: str | None = None
    alignment: int | None = None
    model_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(FullAttentionSpec):
    sliding_window: int | None = 2
    extra_retained_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class ChunkedLocalAttentionSpec(FullAttentionSpec):
    attention_chunk_size: int


@dataclass(frozen=True, kw_only=True)
class MambaSpec:
    block_size: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    page_size_padded: int | None = None
    mamba_type: Mechanism = Mechanism.GDN_ATTN
    mamba_cache_mode: str = "align"
    num_speculative_blocks: int = 0
    tp_replicated: bool = False

    @property
    def page_bytes(self) -> int:
        return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))


@dataclass(frozen=True, kw_only=True)
class UniformTypeKVCacheSpecs:
    block_size: int
    kv_cache_specs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """As vLLM's `KVCacheGroupSpec`."""

    layer_names: list[str]
    kv_cache_spec: Any
    is_eagle_group: bool = False
    enable_kv_transfer: bool = True


def spec_of_layer(group: Group, name: str) -> Any:
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return group.kv_cache_spec if specs is None else specs[name]


@dataclass(frozen=True)
class Heads:
    """Keys and values `[heads, tokens, dim]`: a rank has its share of the heads, or one of few."""

    heads: int

    def rows(self, rank: int, ranks: int) -> list[int]:
        if self.heads >= ranks:
            own = self.heads // ranks
            return list(range(rank * own, (rank + 1) * own))
        return [rank * self.heads // ranks]


@dataclass(frozen=True)
class Parts:
    """Channels `[rows, ...]` made of parts that split by themselves: (units, rows of a unit); one unit is on all."""

    parts: tuple[tuple[int, int], ...]

    def rows(self, rank: int, ranks: int) -> list[int]:
        found: list[int] = []
        first = 0
        for units, size in self.parts:
            own = range(1) if units == 1 else range(rank * (units // ranks), (rank + 1) * (units // ranks))
            found += [first + unit * size + row for unit in own for row in range(size)]
            first += units * size
        return found


@dataclass
class Engine:
    """One rank's pages.

    Attributes:
        groups: as vLLM would give them to this rank.
        splits: how the rows of a tensor of a layer lie on ranks, by tensor name (and mechanism where these differ).
        tensors: by the engine's name of the layer, as vLLM registers them.
    """

    groups: Sequence[Group]
    splits: Mapping[str, Heads | Parts]
    rank: int = 0
    ranks: int = 1
    pages: int = 16
    layout: str = "content"
    kernel_tokens: int | None = None
    seed: int = 0
    tensors: dict[str, Any] = field(default_factory=dict)
    memory: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        places = max(len(group.layer_names) for group in self.groups)
        sizes = [
            getattr(spec, "page_size_padded", None) or spec.page_bytes
            for group in self.groups
            for spec in [spec_of_layer(group, name) for name in group.layer_names]
        ]
        # Layers of different groups share one allocation, since a page is of one group at a time.
        stride = max(sizes)
        for _ in range(places):
            data = rng.integers(0, 256, stride * self.pages, np.uint8)
            self.memory.append(torch.from_numpy(data).view(torch.int8))
        for group in self.groups:
            for place, name in enumerate(group.layer_names):
                self.tensors[name] = self._view(self.memory[place], spec_of_layer(group, name), stride)

    def _view(self, memory: Any, spec: Any, stride: int) -> Any:
        if isinstance(spec, MambaSpec):
            return memory.as_strided((self.pages, 1, 1, spec.page_bytes), (stride, spec.page_bytes, spec.page_bytes, 1))
        tokens = spec.block_size
        pages = self.pages
        if self.kernel_tokens is not None:
            ratio = spec.block_size // self.kernel_tokens
            pages, tokens, stride = pages * ratio, self.kernel_tokens, stride // ratio
        content = spec.content_bytes
        shape = (pages, spec.num_kv_heads, tokens, content)
        strides = (stride, tokens * content, content, 1)
        if self.layout == "tokens first":
            strides = (stride, content, spec.num_kv_heads * content, 1)
        return memory.as_strided(shape, strides).view(spec.dtype)

    # What kernels do

    def token(self, name: str, group: Group, page: int, at: int) -> dict[str, npt.NDArray[np.uint8]]:
        """Views of the bytes of one token in a page, by tensor: `[rows, bytes]` each."""
        spec, tensor = spec_of_layer(group, name), self.tensors[name]
        kernel = tensor.shape[2]
        page, at = page * (spec.block_size // kernel) + at // kernel, at % kernel
        raw = tensor[page].view(torch.uint8)
        size = spec.dtype.itemsize
        if isinstance(spec, MLAAttentionSpec):
            return {"latent": raw.numpy()[:, at]}
        dim = spec.head_size
        if self.layout != "cpu":
            entry = raw.numpy()[:, at]
            return {"keys": entry[:, : dim * size], "values": entry[:, dim * size :]}
        # Keys [dim, tokens], then values [tokens, dim], of each head.
        flat = raw.flatten(1).numpy().reshape(spec.num_kv_heads, 2, dim * kernel, size)
        keys = flat[:, 0].reshape(spec.num_kv_heads, dim, kernel, size)[:, :, at]
        values = flat[:, 1].reshape(spec.num_kv_heads, kernel, dim, size)[:, at]
        return {"keys": keys, "values": values}

    def state(self, name: str, group: Group, page: int) -> dict[str, npt.NDArray[np.uint8]]:
        """Views of the bytes of the states in a page, `[rows, ...]` each."""
        spec = spec_of_layer(group, name)
        raw = self.tensors[name][page].flatten().view(torch.uint8).numpy()
        found = {}
        at = 0
        labels = ["recurrent"] if spec.mamba_type is Mechanism.LINEAR else ["conv", "recurrent"]
        for label, shape, dtype in zip(labels, spec.shapes, spec.dtypes, strict=False):
            size = prod(shape) * dtype.itemsize
            view = raw[at : at + size].reshape(*shape, dtype.itemsize)
            # vLLM has convolution states as [tokens, channels].
            found[label] = view.swapaxes(0, 1) if label == "conv" else view
            at += size
        return found

    def own(self, name: str, label: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of a whole tensor that this rank holds."""
        split = self.splits.get(f"{name}.{label}") or self.splits.get(label)
        return values if split is None else values[split.rows(self.rank, self.ranks)]

    def copy_of_memory(self) -> list[npt.NDArray[np.uint8]]:
        return [each.view(torch.uint8).numpy().copy() for each in self.memory]


def bytes_of(array: npt.NDArray[Any], like: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Values as the bytes that lie at a place of some shape."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(like.shape)


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


def fill(
    engine: Engine,
    spec: ModelSpec,
    prompt: Prompt,
    tables: Sequence[Sequence[int]],
    start: int,
    stop: int,
    at: int | None = None,
) -> None:
    """Have the engine compute tokens `[start, stop)` of a prompt, and its states after `at` tokens."""

    def write(place: npt.NDArray[np.uint8], value: npt.NDArray[np.uint8], what: str) -> None:
        place[...] = value

    _each(engine, spec, prompt, tables, start, stop, at, write, is_needed_only=False)


def fill_loaded(
    engine: Engine, spec: ModelSpec, prompt: Prompt, tables: Sequence[Sequence[int]], start: int, stop: int
) -> None:
    """Have lie in pages what a load of `[start, stop)` must leave there: of windows what is needed."""

    def write(place: npt.NDArray[np.uint8], value: npt.NDArray[np.uint8], what: str) -> None:
        place[...] = value

    _each(engine, spec, prompt, tables, start, stop, stop, write, is_needed_only=True, is_whole_pages=True)


def check(
    engine: Engine, spec: ModelSpec, prompt: Prompt, tables: Sequence[Sequence[int]], start: int, stop: int
) -> None:
    """Compare what the engine's kernels find of tokens `[start, stop)`, and of the states after them.

    Raises:
        AssertionError: something else lies there.
    """

    def compare(place: npt.NDArray[np.uint8], value: npt.NDArray[np.uint8], what: str) -> None:
        assert place.tobytes() == value.tobytes(), what

    _each(engine, spec, prompt, tables, start, stop, stop, compare, is_needed_only=True)


def first_needed(kind: Any, length: int) -> int:
    """The first token whose keys an engine reads after so many tokens."""
    if isinstance(kind, SlidingWindowSpec):
        assert kind.sliding_window is not None
        return max(0, length - kind.sliding_window + 1)
    if isinstance(kind, ChunkedLocalAttentionSpec):
        return length // kind.attention_chunk_size * kind.attention_chunk_size
    return 0


def _each(
    engine: Engine,
    spec: ModelSpec,
    prompt: Prompt,
    tables: Sequence[Sequence[int]],
    start: int,
    stop: int,
    at: int | None,
    use: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8], str], None],
    *,
    is_needed_only: bool,
    is_whole_pages: bool = False,
) -> None:
    for index, group in enumerate(engine.groups):
        for name in group.layer_names:
            kind = spec_of_layer(group, name)
            layer = layer_of(name)
            if isinstance(kind, MambaSpec):
                if at is None:
                    continue
                for label, place in engine.state(name, group, tables[index][(at - 1) // kind.block_size]).items():
                    own = engine.own(name, label, state_values(spec, prompt, layer, label, at))
                    use(place, bytes_of(own, place), f"{label} of {name} at {at}")
                continue
            first = max(start, first_needed(kind, stop)) if is_needed_only else start
            if first == stop:
                continue
            if is_whole_pages:
                # What a window's record has of a page that is needed comes with it.
                window = getattr(kind, "sliding_window", None) or getattr(kind, "attention_chunk_size", None)
                begins = first // kind.block_size * kind.block_size
                first = first if window is None else max(0, begins, stop - window + 1)
            values = {
                label: engine.own(name, label, token_values(spec, prompt, layer, label, first, stop))
                for label in (["latent"] if isinstance(kind, MLAAttentionSpec) else ["keys", "values"])
            }
            for token in range(first, stop):
                page = tables[index][token // kind.block_size]
                if page == NULL_PAGE:
                    assert not is_needed_only, f"token {token} of {name} has no page"
                    continue
                for label, place in engine.token(name, group, page, token % kind.block_size).items():
                    use(place, bytes_of(values[label][:, token - first], place), f"{label} of {name}, token {token}")


# Models

GATED = (4, 8, 4, 6)
"""Key heads, value heads, key dim, value dim of the gated delta rule."""
MAMBA2 = (4, 4, 3)
"""Heads, head dim, state of Mamba-2."""
HEADS, DIM = 2, 8


def model_groups(model: str, page_tokens: int, *, ranks: int = 1, mamba_groups: int = 4) -> list[Group]:
    """What vLLM gives each of some ranks: `dense`, `window`, `chunks`, `latent`, `hybrid`, `mamba2`, `uneven`."""
    own = {"block_size": page_tokens, "num_kv_heads": max(1, HEADS // ranks), "head_size": DIM, "head_size_v": DIM}
    full = FullAttentionSpec(**own)

    def names(*layers: int, kind: str = "self_attn.attn") -> list[str]:
        return [f"model.layers.{layer}.{kind}" for layer in layers]

    if model == "dense":
        return [Group(layer_names=names(0, 1, 2), kv_cache_spec=full)]
    if model == "uneven":
        wide = FullAttentionSpec(**{**own, "head_size": 2 * DIM, "head_size_v": DIM})
        specs = dict(zip(names(0, 1, 2), (full, wide, full), strict=True))
        uniform = UniformTypeKVCacheSpecs(block_size=page_tokens, kv_cache_specs=specs)
        return [Group(layer_names=names(0, 1, 2), kv_cache_spec=uniform)]
    if model == "window":
        window = SlidingWindowSpec(**own, sliding_window=WINDOW)
        return [
            Group(layer_names=names(0, 2), kv_cache_spec=window),
            Group(layer_names=names(1, 3), kv_cache_spec=full),
        ]
    if model == "chunks":
        chunked = ChunkedLocalAttentionSpec(**own, attention_chunk_size=WINDOW)
        return [Group(layer_names=names(0), kv_cache_spec=chunked), Group(layer_names=names(1), kv_cache_spec=full)]
    if model == "latent":
        latent = MLAAttentionSpec(block_size=page_tokens, num_kv_heads=1, head_size=20, dtype=torch.bfloat16)
        heads = ((4 // ranks, 3, 5),)
        linear = MambaSpec(block_size=page_tokens, shapes=heads, dtypes=(torch.float32,), mamba_type=Mechanism.LINEAR)
        return [
            Group(layer_names=names(0, 2), kv_cache_spec=latent),
            Group(layer_names=names(1, kind="mixer"), kv_cache_spec=linear),
        ]
    if model == "hybrid":
        key_heads, value_heads, key_dim, value_dim = GATED
        channels = (2 * key_heads * key_dim + value_heads * value_dim) // ranks
        shapes: tuple[tuple[int, ...], ...] = ((3, channels), (value_heads // ranks, value_dim, key_dim))
        mechanism = Mechanism.GDN_ATTN
    else:
        heads, head_dim, state = MAMBA2
        own_groups = 1 if mamba_groups == 1 else mamba_groups // ranks
        channels = heads // ranks * head_dim + 2 * own_groups * state
        shapes, mechanism = ((3, channels), (heads // ranks, head_dim, state)), Mechanism.MAMBA2
    state_spec = MambaSpec(
        block_size=page_tokens,
        shapes=shapes,
        dtypes=(torch.bfloat16, torch.float32),
        mamba_type=mechanism,
        page_size_padded=max(full.page_bytes, 2048),
    )
    states = [Group(layer_names=names(layer, kind="linear_attn"), kv_cache_spec=state_spec) for layer in range(3)]
    return [*states, Group(layer_names=names(3), kv_cache_spec=full)]


WINDOW = 70


def model_splits(model: str, mamba_groups: int = 4) -> dict[str, Heads | Parts]:
    """How rows of each tensor lie on ranks."""
    splits: dict[str, Heads | Parts] = {"keys": Heads(HEADS), "values": Heads(HEADS)}
    if model == "latent":
        splits["recurrent"] = Heads(4)
    if model == "hybrid":
        key_heads, value_heads, key_dim, value_dim = GATED
        splits["conv"] = Parts(((key_heads, key_dim), (key_heads, key_dim), (value_heads, value_dim)))
        splits["recurrent"] = Heads(value_heads)
    if model == "mamba2":
        heads, head_dim, state = MAMBA2
        splits["conv"] = Parts(((heads, head_dim), (mamba_groups, state), (mamba_groups, state)))
        splits["recurrent"] = Heads(heads)
    return splits
