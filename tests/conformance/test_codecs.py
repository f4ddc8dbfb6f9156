"""Codecs against the kit, and the kit against codecs: each defect below must fail the case named beside it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from kvstore.abc import Codec
from kvstore.codec import RawCodec
from kvstore.errors import CodecError
from kvstore.registry import codec_for
from kvstore.spec import DType
from kvstore.testing.codec import CodecConformance

if TYPE_CHECKING:
    from collections.abc import Callable


class TestRaw(CodecConformance):
    @pytest.fixture
    def codec(self) -> Codec:
        return RawCodec()

    def test_is_found_by_name(self) -> None:
        assert isinstance(codec_for("raw"), RawCodec)

    def test_half_an_element(self, codec: Codec) -> None:
        with pytest.raises(CodecError, match="7 bytes"):
            codec.encode(memoryview(bytes(7)), DType.FLOAT32)


class ZlibCodec(Codec):
    """Variable size, without loss."""

    @property
    def name(self) -> str:
        return "test-zlib"

    def encoded_bytes_max(self, raw_bytes: int, dtype: DType) -> int:
        return raw_bytes + raw_bytes // 1000 + 64

    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        return zlib.compress(piece, 1)

    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        decoder = zlib.decompressobj()
        try:
            decoded = decoder.decompress(encoded, raw_bytes + 1)
        except zlib.error as error:
            raise CodecError(f"not a zlib stream: {error}") from error
        if len(decoded) != raw_bytes or not decoder.eof:
            raise CodecError(f"the stream does not hold {raw_bytes} bytes")
        return decoded


class TestZlib(CodecConformance):
    @pytest.fixture
    def codec(self) -> Codec:
        return ZlibCodec()


class ScaledInt8(Codec):
    """Fixed size, with loss, for the floats of NumPy."""

    @property
    def name(self) -> str:
        return "test-int8"

    @property
    def is_lossy(self) -> bool:
        return True

    def encoded_bytes_max(self, raw_bytes: int, dtype: DType) -> int:
        return 8 + raw_bytes // dtype.itemsize

    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        if dtype not in (DType.FLOAT32, DType.FLOAT64):
            raise CodecError(f"{dtype.label} cannot be quantized")
        with np.errstate(invalid="ignore"):
            values = np.nan_to_num(np.frombuffer(piece, dtype.storage).astype(np.float64), posinf=0.0, neginf=0.0)
        scale = float(np.abs(values).max()) / 127 or 1.0
        return np.float64(scale).tobytes() + np.round(values / scale).astype(np.int8).tobytes()

    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        if encoded.nbytes != 8 + raw_bytes // dtype.itemsize:
            raise CodecError("the length is not that of this piece")
        scale: np.ndarray[Any, Any] = np.frombuffer(encoded[:8], np.float64)
        with np.errstate(all="ignore"):
            return (np.frombuffer(encoded[8:], np.int8) * scale).astype(dtype.storage).tobytes()


class TestScaledInt8(CodecConformance):
    error_max: ClassVar[dict[DType, float]] = {DType.FLOAT32: 1 / 250, DType.FLOAT64: 1 / 250}

    @pytest.fixture
    def codec(self) -> Codec:
        return ScaledInt8()


class DropsTheLastElement(ZlibCodec):
    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        return super().decode(encoded, dtype, raw_bytes)[: -dtype.itemsize]


class FlushesSmallNumbers(RawCodec):
    """Loses what it does not say it loses."""

    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        return bytes(byte if byte > 1 else 0 for byte in piece.tobytes())


class TooOptimistic(ZlibCodec):
    def encoded_bytes_max(self, raw_bytes: int, dtype: DType) -> int:
        return raw_bytes // 2 + 1


class LeaksItsErrors(ZlibCodec):
    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        decoded = zlib.decompress(encoded)
        if len(decoded) != raw_bytes:
            raise CodecError("another length")
        return decoded


class TrustsTheLength(RawCodec):
    def decode(self, encoded: memoryview, dtype: DType, raw_bytes: int) -> bytes:
        return encoded.tobytes()


class EncodesInPlace(RawCodec):
    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        encoded = piece.tobytes()
        if not piece.readonly:
            piece[0] ^= 1
        return encoded


class NeverTheSame(ZlibCodec):
    def __init__(self) -> None:
        self._level = 0

    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        self._level = self._level % 9 + 1
        return zlib.compress(piece, self._level)


class TooCoarse(ScaledInt8):
    def encode(self, piece: memoryview, dtype: DType) -> bytes:
        encoded = bytearray(super().encode(piece, dtype))
        encoded[8:] = bytes(byte & 0xF0 for byte in encoded[8:])
        return bytes(encoded)


@pytest.mark.parametrize(
    ("broken", "case"),
    [
        (DropsTheLastElement, lambda kit, codec: kit.test_round_trip(codec, DType.INT16)),
        (FlushesSmallNumbers, lambda kit, codec: kit.test_round_trip(codec, DType.UINT8)),
        (TooOptimistic, lambda kit, codec: kit.test_round_trip(codec, DType.UINT8)),
        (LeaksItsErrors, lambda kit, codec: kit.test_truncated_bytes(codec)),
        (TrustsTheLength, lambda kit, codec: kit.test_a_piece_of_another_length(codec)),
        (EncodesInPlace, lambda kit, codec: kit.test_the_input_is_left_alone(codec)),
        (NeverTheSame, lambda kit, codec: kit.test_the_same_bytes_each_time(codec)),
    ],
)
def test_the_kit_notices(broken: Callable[[], Codec], case: Callable[[CodecConformance, Codec], None]) -> None:
    kit = CodecConformance()
    case(kit, ZlibCodec())
    with pytest.raises((AssertionError, zlib.error, pytest.fail.Exception)):
        case(kit, broken())


def test_the_kit_notices_too_much_loss() -> None:
    kit = TestScaledInt8()
    kit.test_round_trip(ScaledInt8(), DType.FLOAT32)
    with pytest.raises(AssertionError):
        kit.test_round_trip(TooCoarse(), DType.FLOAT32)
    with pytest.raises(AssertionError):
        CodecConformance().test_round_trip(_Unannounced(), DType.FLOAT32)


class _Unannounced(ScaledInt8):
    @property
    def is_lossy(self) -> bool:
        return False
