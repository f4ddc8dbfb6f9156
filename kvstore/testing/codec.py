"""Conformance kit for codecs.

A test module of the implementer's own:

    class TestMine(CodecConformance):
        error_max = {DType.FLOAT32: 0.01}     # a lossy codec: largest error, relative to the piece's largest value

        @pytest.fixture
        def codec(self):
            return MyCodec()

A codec without loss must give every byte back. A lossy one must stay within `error_max` for the types that it
names there, and refuse the others with `CodecError`.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from kvstore.errors import CodecError
from kvstore.spec import DType
from kvstore.testing.resources import Background

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.abc import Codec

TEST_S = 30.0
ELEMENTS = (1, 2, 3, 64, 1000, 16384)
SMALL_FLOATS = (DType.BFLOAT16, DType.FLOAT8_E4M3FN, DType.FLOAT8_E5M2)
"""Types whose bits NumPy does not read: the kit checks their errors for codecs without loss only."""


class CodecConformance:
    """The cases; a subclass gives the codec."""

    error_max: ClassVar[Mapping[DType, float]] = {}

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec under test."""
        raise NotImplementedError("override the fixture `codec`")

    def test_the_name_can_stand_in_a_record(self, codec: Codec) -> None:
        assert re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", codec.name), codec.name
        assert len(codec.name) <= 64
        assert isinstance(codec.is_lossy, bool)

    @pytest.mark.parametrize("dtype", DType, ids=lambda dtype: dtype.label)
    def test_round_trip(self, codec: Codec, dtype: DType) -> None:
        for content in contents(dtype):
            if codec.is_lossy and dtype not in self.error_max:
                with pytest.raises(CodecError):
                    codec.encode(memoryview(content), dtype)
                continue
            encoded = codec.encode(memoryview(content), dtype)
            assert len(encoded) <= codec.encoded_bytes_max(len(content), dtype), "more bytes than was said"
            decoded = codec.decode(memoryview(encoded), dtype, len(content))
            assert len(decoded) == len(content)
            if not codec.is_lossy:
                assert decoded == content
            elif dtype not in SMALL_FLOATS:
                self._check_error(decoded, content, dtype)

    def _check_error(self, decoded: bytes, content: bytes, dtype: DType) -> None:
        with np.errstate(invalid="ignore"):
            values: np.ndarray[Any, Any] = np.frombuffer(content, dtype.storage).astype(np.float64)
        if not np.isfinite(values).all():
            return
        error = np.abs(np.frombuffer(decoded, dtype.storage).astype(np.float64) - values).max()
        assert error <= self.error_max[dtype] * max(float(np.abs(values).max()), 1e-300)

    def test_the_bound_never_shrinks(self, codec: Codec) -> None:
        for dtype in self._types(codec):
            bounds = [codec.encoded_bytes_max(elements * dtype.itemsize, dtype) for elements in ELEMENTS]
            assert bounds == sorted(bounds)
            assert bounds[0] > 0

    def test_the_same_bytes_each_time(self, codec: Codec) -> None:
        """Stored bytes are checksummed and compared across nodes."""
        for dtype in self._types(codec):
            content = contents(dtype)[-1]
            assert codec.encode(memoryview(content), dtype) == codec.encode(memoryview(content), dtype)

    def test_the_input_is_left_alone(self, codec: Codec) -> None:
        for dtype in self._types(codec):
            content = contents(dtype)[-1]
            piece = bytearray(content)
            encoded = codec.encode(memoryview(piece), dtype)
            assert piece == content
            stored = bytearray(encoded)
            codec.decode(memoryview(stored), dtype, len(content))
            assert stored == encoded

    def test_read_only_input(self, codec: Codec) -> None:
        for dtype in self._types(codec):
            content = contents(dtype)[-1]
            encoded = codec.encode(memoryview(content).toreadonly(), dtype)
            codec.decode(memoryview(encoded).toreadonly(), dtype, len(content))

    def test_a_piece_of_another_length(self, codec: Codec) -> None:
        for dtype in self._types(codec):
            content = contents(dtype)[-1]
            encoded = memoryview(codec.encode(memoryview(content), dtype))
            for raw_bytes in (len(content) - dtype.itemsize, len(content) + dtype.itemsize, 0):
                with pytest.raises(CodecError):
                    codec.decode(encoded, dtype, raw_bytes)

    def test_truncated_bytes(self, codec: Codec) -> None:
        for dtype in self._types(codec):
            content = contents(dtype)[-1]
            encoded = memoryview(codec.encode(memoryview(content), dtype))
            for kept in sorted({0, 1, len(encoded) // 2, len(encoded) - 1}):
                with pytest.raises(CodecError):
                    codec.decode(encoded[:kept], dtype, len(content))

    def test_foreign_bytes_are_an_error_or_a_piece(self, codec: Codec) -> None:
        """Never a crash, another exception, or another length: a piece's checksum is not the codec's business."""
        for dtype in self._types(codec):
            content = contents(dtype)[-1]
            encoded = codec.encode(memoryview(content), dtype)
            source = random.Random(1)
            for _ in range(50):
                damaged = bytearray(encoded)
                for _ in range(source.randrange(1, 9)):
                    damaged[source.randrange(len(damaged))] = source.randrange(256)
                try:
                    decoded = codec.decode(memoryview(damaged), dtype, len(content))
                except CodecError:
                    continue
                assert len(decoded) == len(content)

    def test_many_threads(self, codec: Codec) -> None:
        dtype = self._types(codec)[0]
        pieces = contents(dtype)
        expected = [codec.encode(memoryview(piece), dtype) for piece in pieces]

        def work() -> None:
            for _ in range(20):
                for piece, encoded in zip(pieces, expected, strict=True):
                    assert codec.encode(memoryview(piece), dtype) == encoded
                    codec.decode(memoryview(encoded), dtype, len(piece))

        for thread in [Background(work) for _ in range(4)]:
            thread.result(TEST_S)

    def _types(self, codec: Codec) -> list[DType]:
        return [dtype for dtype in DType if not codec.is_lossy or dtype in self.error_max]


def contents(dtype: DType) -> list[bytes]:
    """Pieces of one type: noise of several lengths, zeros, one value, small numbers, and every bit set."""
    source = random.Random(dtype.label)
    noise = [source.randbytes(elements * dtype.itemsize) for elements in ELEMENTS]
    small: np.ndarray[Any, Any] = np.random.default_rng(0).normal(size=1000)
    if dtype in SMALL_FLOATS or dtype.storage.kind != "f":
        small = np.clip(small * 20, -100, 100).round()
        values = np.abs(small).astype(dtype.storage)
    else:
        values = small.astype(dtype.storage)
    size = 4096 * dtype.itemsize
    return [*noise, b"\xff" * size, bytes(size), source.randbytes(dtype.itemsize) * 4096, values.tobytes()]
