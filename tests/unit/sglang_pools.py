"""Stand-ins for SGLang's host pools: the classes' names, layouts and page methods, over numpy arrays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.adapters.sglang.config import BackendConfig
from kvstore.adapters.sglang.position import Position
from kvstore.adapters.sglang.storage import PageStorage

PAGE_TOKENS = 4
LAYERS = 3
HEADS = 2
HEAD_DIM = 8
PAGES = 32
PAGE_BYTES = 2 * LAYERS * PAGE_TOKENS * HEADS * HEAD_DIM * 2
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


class FlatTensor:
    """As much of a CPU tensor as a storage backend sees, over an array."""

    device = SimpleNamespace(type="cpu")

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return self.array.itemsize

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    def contiguous(self) -> FlatTensor:
        return self if self.is_contiguous() else FlatTensor(np.ascontiguousarray(self.array))


class HostPoolBase:
    """What all pools have."""

    page_size = PAGE_TOKENS
    layout = "page_first"
    dtype = "torch.bfloat16"
    kv_buffer: Any = None

    def fill(self, seed: int) -> None:
        for number, buffer in enumerate(self.buffers()):
            buffer[...] = np.random.default_rng((seed, number)).integers(0, 1 << 15, buffer.shape).astype(buffer.dtype)

    def zero(self) -> None:
        for buffer in self.buffers():
            buffer[...] = 0

    def buffers(self) -> list[npt.NDArray[Any]]:
        raise NotImplementedError

    def page_bytes(self, page: int) -> bytes:
        """The page's bytes, however it is laid out: what a reader must see again."""
        return self.get_data_page(page * self.page_size).array.tobytes()

    def get_data_page(self, index: int, flat: bool = True) -> FlatTensor:
        raise NotImplementedError


class MHATokenToKVPoolHost(HostPoolBase):
    """Keys and values, as SGLang 0.5.23 lays them out (`pool_host/mha.py`)."""

    layer_num, head_num, head_dim, start_layer, end_layer = LAYERS, HEADS, HEAD_DIM, 0, LAYERS

    def __init__(self, layout: str = "page_first", *, dtype: str = "torch.bfloat16", pages: int = PAGES) -> None:
        self.layout = layout
        self.dtype = dtype
        self.pages = pages
        slots, inner = pages * PAGE_TOKENS, (HEADS, HEAD_DIM)
        shapes = {
            "layer_first": (2, LAYERS, slots, *inner),
            "page_first": (2, slots, LAYERS, *inner),
            "page_first_direct": (2, pages, LAYERS, PAGE_TOKENS, *inner),
            "page_head": (2, pages, HEADS, PAGE_TOKENS, LAYERS, HEAD_DIM),
        }
        self.kv_buffer = np.zeros(shapes[layout], np.uint16)

    def buffers(self) -> list[npt.NDArray[Any]]:
        return [self.kv_buffer]

    def _page(self, index: int) -> npt.NDArray[Any]:
        index = int(index)
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + PAGE_TOKENS]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + PAGE_TOKENS]
        return self.kv_buffer[:, index // PAGE_TOKENS]

    def get_data_page(self, index: int, flat: bool = True) -> FlatTensor:
        return FlatTensor(np.ascontiguousarray(self._page(index)).reshape(-1))

    def get_dummy_flat_data_page(self) -> FlatTensor:
        return FlatTensor(np.zeros(self._page(0).size, np.uint16))

    def set_from_flat_data_page(self, index: int, data_page: FlatTensor) -> None:
        page = self._page(index)
        page[...] = data_page.array.reshape(page.shape)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        assert len(indices) % PAGE_TOKENS == 0
        addresses, sizes = [], []
        for index in indices.tolist()[::PAGE_TOKENS]:
            page = self._page(index)
            parts = page.swapaxes(0, 1) if self.layout == "layer_first" else page[None]
            for part in parts:
                for piece in part:
                    assert piece.flags.c_contiguous
                    addresses.append(piece.ctypes.data)
                    sizes.append(piece.nbytes)
        return addresses, sizes


class MLATokenToKVPoolHost(MHATokenToKVPoolHost):
    """One that all tensor-parallel ranks hold alike."""


class MambaPoolHost(HostPoolBase):
    """States: one slot each, a recurrent and a convolution part (`pool_host/mamba.py`)."""

    page_size = 1
    conv_dtype, temporal_dtype = "torch.bfloat16", "torch.float32"
    has_side_states = False

    def __init__(self, slots: int = 16) -> None:
        self.temporal_buffer = np.zeros((slots, 2, 1, 4, 4), np.float32)
        self.conv_buffer = [np.zeros((slots, 2, 1, 3, 8), np.uint16)]
        self.kv_buffer = self.buffers()

    def buffers(self) -> list[npt.NDArray[Any]]:
        return [self.temporal_buffer, *self.conv_buffer]

    def get_data_page(self, index: int, flat: bool = True) -> FlatTensor:
        parts = [np.ascontiguousarray(each[int(index)]).reshape(-1).view(np.uint8) for each in self.buffers()]
        return FlatTensor(np.concatenate(parts))

    def get_dummy_flat_data_page(self) -> FlatTensor:
        return FlatTensor(np.zeros(sum(each[0].nbytes for each in self.buffers()), np.uint8))

    def set_from_flat_data_page(self, index: int, data_page: FlatTensor) -> None:
        at = 0
        for each in self.buffers():
            size_bytes = each[0].nbytes
            each[int(index)] = data_page.array[at : at + size_bytes].view(each.dtype).reshape(each[0].shape)
            at += size_bytes

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        if self.has_side_states:
            raise NotImplementedError("Mamba storage zero-copy does not carry registered slot side states")
        slots = indices.tolist()
        addresses = [each[slot].ctypes.data for slot in slots for each in self.buffers()]
        return addresses, [each[0].nbytes for _ in slots for each in self.buffers()]


class LogicalHostPool(HostPoolBase):
    """An anchor that only numbers pages."""

    dtype = "torch.uint8"

    def get_page_buffer_meta(self, indices: Any) -> None:
        return None


class DeepSeekV4PagedHostPool(MHATokenToKVPoolHost):
    """Compressed pages of the kind that hangs on such an anchor."""


def slots_of(pages: list[int], page_slots: int = PAGE_TOKENS) -> npt.NDArray[np.int64]:
    """Indices of pages as SGLang passes them."""
    return (np.asarray(pages, np.int64)[:, None] * page_slots + np.arange(page_slots)).reshape(-1)


def hashes(count: int, *, salt: str = "", first: int = 0) -> list[str]:
    """Page hashes such as SGLang makes."""
    from hashlib import sha256

    return [sha256(f"{salt}/{number}".encode()).hexdigest() for number in range(first, first + count)]


def make_storage(
    *pools: tuple[str, Any],
    position: Position | None = None,
    is_zero_copy: bool = True,
    model: str = "tiny",
    version: str = "0.5.23",
    kv_dtype: str = "",
    is_open: bool = True,
    **settings: Any,
) -> PageStorage:
    """A backend with its pools registered; its store is this process's unless settings say another."""
    if "socket" not in settings:
        settings.setdefault("dram", "8MiB")
    config = BackendConfig.parse({"weights": "random", **settings})
    storage = PageStorage(config, position or Position(), model=model, version=version, is_zero_copy=is_zero_copy)
    for name, pool in pools:
        storage.register(name, pool, kv_dtype=kv_dtype)
    if is_open:
        storage.open()
    return storage
