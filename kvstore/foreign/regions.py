"""Memory of a caller that objects are copied from and into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kvstore._native import addresses_of
from kvstore.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Sequence

Memory: TypeAlias = "Any"
"""A `Region`, whatever has a contiguous buffer, a CPU tensor; or a sequence of such that follow one another.

The caller keeps it alive and in place until the call, or its handle, has ended."""


class Region(NamedTuple):
    """Bytes at an address.

    Attributes:
        address: of the first byte.
        size_bytes: how many.
    """

    address: int
    size_bytes: int


def regions_of(memory: Memory, *, is_written: bool) -> tuple[Region, ...]:
    """Where a caller's memory lies.

    Raises:
        WriteError: it is no memory, is not contiguous, lies on a device, or is to be written and is read-only.
    """
    if type(memory) is Region:
        if memory.address <= 0 or memory.size_bytes <= 0:
            raise WriteError(f"{memory} is no memory: an address and a number of bytes, both above 0")
        return (memory,)
    if isinstance(memory, list | tuple):
        return tuple(region for each in memory for region in regions_of(each, is_written=is_written))
    if hasattr(memory, "data_ptr"):
        if memory.device.type != "cpu" or not memory.is_contiguous():
            raise WriteError("a tensor that an object is copied to or from is contiguous and on the CPU")
        return (Region(memory.data_ptr(), memory.numel() * memory.element_size()),)
    try:
        view = memoryview(memory)
    except TypeError as error:
        raise WriteError(
            f"a {type(memory).__name__} is no memory; pass bytes, an array, a CPU tensor or a Region"
        ) from error
    if not view.c_contiguous or (is_written and view.readonly):
        raise WriteError("memory that an object is copied to or from is contiguous, and writable to be written")
    return (Region(int(addresses_of([view])[0]), view.nbytes),) if view.nbytes else ()


def size_of(regions: Sequence[Region]) -> int:
    """Bytes of all of them."""
    return sum(region.size_bytes for region in regions)
