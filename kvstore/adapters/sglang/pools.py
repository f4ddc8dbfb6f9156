"""SGLang's host pools as objects: what makes the bytes of a page what they are, and where they lie."""

from __future__ import annotations

import enum
import json
import sys
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvstore.errors import ConfigError
from kvstore.foreign import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.adapters.sglang.position import Position

ANCHOR = "kv"
"""The pool whose pages stand for the prefix; SGLang's `PoolName.KV`."""

_REPLICATED = frozenset(
    {"MLATokenToKVPoolHost", "DSAIndexerPoolHost", "DeepSeekV4PagedHostPool", "DeepSeekV4StateHostPool"}
)
"""Classes (and their subclasses) that hold the same on every tensor-parallel rank if the anchor does."""
_NAMELESS_TYPES = frozenset({"uint8", "int8"})
_TYPED = frozenset({"MHATokenToKVPoolHost", "MHATokenToKOnlyPoolHost", "MLATokenToKVPoolHost"})
"""Classes that keep 8-bit floats as bytes: the pool itself does not say which floats they are."""
_FACTS = (
    "layout", "dtype", "temporal_dtype", "conv_dtype", "indexer_dtype", "layer_num", "target_layer_num",
    "num_mamba_layers", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim", "kv_lora_rank",
    "qk_rope_head_dim", "storage_format_tag",
)  # fmt: skip
"""Attributes of SGLang's pools that say how a page is made up; a pool has some of them."""


class Indices(Protocol):
    """Slots of a host pool, page after page: a tensor, or an array."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Any: ...


class Form(enum.Enum):
    """How a page's bytes are had."""

    PIECES = "pieces"  # where they lie, by addresses
    FLAT = "flat"  # as one tensor, copied together by the pool
    NONE = "none"  # there are none: the pool only numbers pages, and others hold what belongs to them


@dataclass(frozen=True)
class HostPool:
    """One of SGLang's host pools.

    Attributes:
        name: as in `PoolTransfer.name`: `kv`, `mamba`, `swa`, ...
        pool: SGLang's own.
        form: how its pages are read and written.
        page_slots: slots that a page takes in an array of indices.
        piece_bytes: sizes of the pieces of a page, in order.
        is_replicated: every tensor-parallel rank holds the same bytes.
        facts: what makes its bytes what they are, as JSON.
    """

    name: str
    pool: Any
    form: Form
    page_slots: int
    piece_bytes: tuple[int, ...]
    is_replicated: bool
    facts: str

    @property
    def size_bytes(self) -> int:
        """Bytes of a page."""
        return sum(self.piece_bytes)

    @property
    def group(self) -> str:
        """Name of its objects in the store: the pool's, and a digest of the facts."""
        return f"{self.name}.{sha256(self.facts.encode()).hexdigest()[:32]}"

    def are_pages(self, indices: Indices | None, count: int) -> bool:
        """Whether an array of indices is one of so many pages."""
        return indices is not None and len(indices) == count * self.page_slots

    def regions(self, indices: Indices, count: int) -> list[list[Region]]:
        """Where the pieces of each page lie. The form is `PIECES`.

        Raises:
            ConfigError: they are others than when the pool was registered.
        """
        addresses, sizes = self.pool.get_page_buffer_meta(indices)
        parts = len(self.piece_bytes)
        if len(addresses) != count * parts or tuple(sizes[:parts]) != self.piece_bytes:
            raise ConfigError(
                f"SGLang's pool {self.name} has {len(addresses)} pieces of {list(sizes[:parts])} bytes for {count} "
                f"pages, and had {parts} of {list(self.piece_bytes)} for each when it was registered"
            )
        pieces = [Region(int(address), int(size)) for address, size in zip(addresses, sizes, strict=True)]
        return [[piece for piece in pieces[at : at + parts] if piece.size_bytes] for at in range(0, len(pieces), parts)]

    def page(self, indices: Indices, number: int) -> Any:
        """A copy or view of a page's bytes as a flat tensor. The form is `FLAT`."""
        return self.pool.get_data_page(indices[number * self.page_slots], flat=True).contiguous()

    def empty_page(self) -> Any:
        """Memory for a page. The form is `FLAT`."""
        return self.pool.get_dummy_flat_data_page()

    def set_page(self, indices: Indices, number: int, page: Any) -> None:
        """Put a page in its place. The form is `FLAT`."""
        self.pool.set_from_flat_data_page(indices[number * self.page_slots], page)


def describe(name: str, pool: Any, position: Position, *, kv_dtype: str, is_zero_copy: bool) -> HostPool:
    """A pool that SGLang registers.

    Args:
        name: what SGLang calls it.
        pool: SGLang's own.
        position: whose pool it is.
        kv_dtype: element type of the cache, where the pool does not say.
        is_zero_copy: the anchor's pages are asked for by address, not as tensors. Other pools' always are where they
            can be.

    Raises:
        ConfigError: its pages cannot be stored, or what they are is not known.
    """
    kind = type(pool).__name__
    ancestors = {each.__name__ for each in type(pool).__mro__}
    if getattr(pool, "stores_page_envelope", False) or "PageInterleaveHostPool" in ancestors:
        raise ConfigError(
            f"this backend cannot store pages of SGLang's {name} pool of class {kind}: they hold several pools' bytes, "
            "or lie on one of the ranks each"
        )
    is_replicated = position.is_replicated and (name == ANCHOR or bool(ancestors & _REPLICATED))
    if position.is_replicated and not is_replicated and name != "mamba" and position.tp_size > 1:
        raise ConfigError(
            f"SGLang's {name} pool of class {kind} differs between tensor-parallel ranks, but with a cache that all of "
            "them hold SGLang writes it from one rank only: it would never be found. Start SGLang with one "
            "tensor-parallel rank, or without what needs this pool"
        )
    form: Form
    pieces: tuple[int, ...]
    if "LogicalHostPool" in ancestors:
        form, pieces = Form.NONE, ()
    elif name == ANCHOR and not is_zero_copy:
        form, pieces = Form.FLAT, (_flat_bytes(pool),)
    else:
        form, pieces = _form_of(name, pool)
    page_slots = int(getattr(pool, "page_size", 1) or 1)
    facts: dict[str, Any] = {
        "class": kind,
        "form": form.value,
        "page_slots": page_slots,
        "pieces": " ".join(f"{len(list(run))}x{size}" for size, run in groupby(pieces)),
        "share": position.share(is_replicated=is_replicated),
    }
    for fact in _FACTS:
        value = getattr(pool, fact, None)
        if value is not None:
            facts[fact] = str(value).removeprefix("torch.")
    if facts.get("dtype") in _NAMELESS_TYPES:
        if not kv_dtype and ancestors & _TYPED:
            raise ConfigError(
                f"SGLang's {name} pool holds bytes and does not say of which element type; set kv_dtype, such as "
                "fp8_e4m3, or start SGLang with --kv-cache-dtype"
            )
        facts["kv_dtype"] = kv_dtype
    return HostPool(name, pool, form, page_slots, pieces, is_replicated, json.dumps(facts, sort_keys=True))


def _form_of(name: str, pool: Any) -> tuple[Form, tuple[int, ...]]:
    try:
        meta = pool.get_page_buffer_meta(_first_page(int(getattr(pool, "page_size", 1) or 1)))
    except (NotImplementedError, ValueError) as error:
        if name == ANCHOR:
            raise ConfigError(
                f"SGLang's pool of class {type(pool).__name__} with layout {getattr(pool, 'layout', '?')} does not say "
                f"where its pages lie ({error}); take interface_v1 out of the settings, or use another "
                "--hicache-mem-layout"
            ) from error
        return Form.FLAT, (_flat_bytes(pool),)
    if not meta or not meta[1]:
        raise ConfigError(f"SGLang's {name} pool of class {type(pool).__name__} has no memory to store")
    return Form.PIECES, tuple(int(size) for size in meta[1])


def _first_page(slots: int) -> Any:
    """Indices of the first page, of the kind that SGLang's pools take: tensors, wherever SGLang is."""
    torch = sys.modules.get("torch")
    return np.arange(slots) if torch is None else torch.arange(slots, dtype=torch.int64)


def _flat_bytes(pool: Any) -> int:
    try:
        return tensor_bytes(pool.get_dummy_flat_data_page())
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"SGLang's pool of class {type(pool).__name__} with layout {getattr(pool, 'layout', '?')} has no pages for "
            f"a storage backend: {error}"
        ) from error


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor's elements."""
    return int(tensor.numel()) * int(tensor.element_size())


def page_keys(keys: Sequence[str]) -> list[bytes]:
    """SGLang's page hashes, as they are, for the store."""
    return [key.encode() for key in keys]
