"""Bounds-checked reading of fixed little-endian layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import ProtocolError

if TYPE_CHECKING:
    import struct

    import numpy.typing as npt

    from kvstore.errors import KVStoreError


class Reader:
    """Takes a payload apart from the front; every error names the message.

    Args:
        error: what is raised for bytes that do not fit.
    """

    def __init__(self, data: memoryview, message: str, error: type[KVStoreError] = ProtocolError) -> None:
        self._data = data.cast("B") if data.nbytes else memoryview(b"")
        self._message = message
        self._error = error
        self._offset = 0

    def _take(self, size_bytes: int) -> memoryview:
        left = self._data.nbytes - self._offset
        if size_bytes > left:
            raise self._error(f"{self._message} is truncated: {size_bytes} bytes are expected, {left} are left")
        start = self._offset
        self._offset += size_bytes
        return self._data[start : self._offset]

    def fixed(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self._take(layout.size))

    def bytes(self, size_bytes: int) -> bytes:
        return bytes(self._take(size_bytes))

    def text(self, size_bytes: int) -> str:
        """UTF-8 for people: what is not valid is replaced."""
        return self.bytes(size_bytes).decode(errors="replace")

    def rows(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        """A copy of `count` rows."""
        return np.frombuffer(self._take(dtype.itemsize * count), dtype, count).copy()

    def finish(self) -> None:
        """Nothing may be left."""
        left = self._data.nbytes - self._offset
        if left:
            raise self._error(f"{self._message} has {left} bytes too many")


def check_zero(message: str, *reserved: int, error: type[KVStoreError] = ProtocolError) -> None:
    """Reserved fields are zero, so that they can get a meaning later."""
    if any(reserved):
        raise error(f"{message} carries reserved bytes that are not zero")


def clipped_utf8(text: str, bytes_max: int) -> bytes:
    """UTF-8 of at most `bytes_max` bytes, cut between characters."""
    return text.encode(errors="replace")[:bytes_max].decode(errors="ignore").encode()
