"""The codec that changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.abc import Codec
from kvstore.errors import CodecError

if TYPE_CHECKING:
    from kvstore.spec.dtypes import DType


class RawCodec(Codec):
    """Pieces as they are in memory: little-endian elements, without framing. Any thread may call."""

    @property
    def name(self) -> str:
        return "raw"

    def encoded_bytes_max(self, raw_bytes: int, dtype: DType) -> int:
        return raw_bytes

    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        if piece.nbytes % dtype.itemsize:
            raise CodecError(
                f"a piece of {piece.nbytes} bytes is no whole number of {dtype.label} elements; pass a whole piece"
            )
        return piece.tobytes()

    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        if encoded.nbytes != raw_bytes:
            raise CodecError(
                f"{encoded.nbytes} raw bytes were stored where the piece has {raw_bytes}; the record is of another spec"
            )
        return encoded.tobytes()
