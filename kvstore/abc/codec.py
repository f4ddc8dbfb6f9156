"""How the bytes of a piece are stored: as they are, quantized, or compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.spec.dtypes import DType


class Codec(ABC):
    """Turns the raw bytes of one piece into stored bytes and back. Stateless; any thread may call.

    Equal pieces give equal bytes every time, since stored bytes are checksummed and compared across nodes. What comes
    in may be read-only, and is left as it is.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in a record's codec chain, stable for ever: at most 64 of a-z, 0-9, `.`, `_` and `-`."""

    @property
    def is_lossy(self) -> bool:
        """Whether decoding may give other bytes than went in. Exact readers never get such records."""
        return False

    @abstractmethod
    def encoded_bytes_max(self, raw_bytes: int, dtype: DType) -> int:
        """The most bytes that `encode` may give for `raw_bytes`, above 0, never less for more: slots are sized so."""

    @abstractmethod
    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        """Stored form of one piece.

        Raises:
            CodecError: the piece cannot be encoded: with loss, each type whose error is not bounded.
        """

    @abstractmethod
    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        """The piece again, exactly `raw_bytes` long.

        Raises:
            CodecError: the bytes are not of this codec, are cut short, or give another length. Damaged bytes raise it,
                or give other bytes of the right length; they never raise anything else.
        """
