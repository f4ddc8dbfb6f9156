"""What `put` and `copy_to` take: torch, NumPy, DLPack, the buffer protocol; everything else is a clear error."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

import kvstore
from kvstore.errors import KVStoreError, LeaseError, WriteError
from kvstore.record.array_view import view_array
from kvstore.record.copy import check_array
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, Shard, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable


def toy_group(*, has_tokens: bool = True, dtype: DType = DType.FLOAT32) -> CacheGroup:
    tensor = TensorSpec("t", dtype, (Segment("heads", 2, 1),), (3,), has_tokens)
    return CacheGroup("g", ReuseRule.ATTENTION if has_tokens else ReuseRule.STATE, (0,), (tensor,))


def check(array: Any, *, has_tokens: bool = True, dtype: DType = DType.FLOAT32, tokens: int = 4) -> Any:
    return check_array(
        array, toy_group(has_tokens=has_tokens, dtype=dtype), 0, Shard(), tokens, "the tensor", WriteError
    )


def counting(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_numpy_is_viewed_where_it_lies() -> None:
    source = counting(2, 4, 3)
    view = view_array(source, DType.FLOAT32, "it")
    assert (view.address, view.shape, view.strides) == (source.ctypes.data, (2, 4, 3), (48, 12, 4))
    assert view.is_writable
    source.flags.writeable = False
    assert not view_array(source, DType.FLOAT32, "it").is_writable


class OnlyDLPack:
    """An array of a library that kvstore has never heard of."""

    def __init__(self, source: np.ndarray[Any, Any]) -> None:
        self.source = source

    def __dlpack__(self, **options: Any) -> Any:
        return self.source.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.source.__dlpack_device__()


def test_dlpack_and_buffers_share_memory() -> None:
    source = counting(2, 4, 3)
    assert view_array(OnlyDLPack(source), DType.FLOAT32, "it").address == source.ctypes.data
    assert view_array(source.data, DType.FLOAT32, "it").address == source.ctypes.data
    numbers = array.array("f", range(6))
    view = view_array(numbers, DType.FLOAT32, "it")
    assert (view.address, view.shape, view.is_writable) == (numbers.buffer_info()[0], (6,), True)
    assert not view_array(bytes(6), DType.UINT8, "it").is_writable
    values = pa.array([1.0, 2.0], pa.float32())
    assert view_array(values, DType.FLOAT32, "it").address == values.buffers()[1].address


class UnreachableDLPack(OnlyDLPack):
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("lies on a device")


@pytest.mark.parametrize(
    "array",
    [[[1.0, 2.0]], 3.0, None, object(), UnreachableDLPack(counting(2)), np.array([object()])],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_array_is_refused(array: Any) -> None:
    """Lists too: what is copied into a temporary array of their values would be lost."""
    with pytest.raises(WriteError, match="it "):
        view_array(array, DType.FLOAT64, "it")


@pytest.mark.parametrize("found", ["<f8", "<f2", ">f4", "<i4", "<c8", "?"])
def test_another_type_is_refused(found: str) -> None:
    with pytest.raises(WriteError, match="the spec says float32"):
        view_array(np.zeros(3, found), DType.FLOAT32, "it")


def test_bfloat16_and_float8_come_as_integers_or_by_name() -> None:
    assert view_array(np.zeros(3, np.uint16), DType.BFLOAT16, "it").dtype is DType.BFLOAT16
    assert view_array(np.zeros(3, np.uint8), DType.FLOAT8_E5M2, "it").dtype is DType.FLOAT8_E5M2
    with pytest.raises(WriteError, match=r"the spec says bfloat16 \(in NumPy: uint16\)"):
        view_array(np.zeros(3, np.float32), DType.BFLOAT16, "it")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert view_array(np.zeros(3, ml_dtypes.bfloat16), DType.BFLOAT16, "it").strides == (2,)


def test_torch_tensors_are_viewed_where_they_lie() -> None:
    torch = pytest.importorskip("torch")
    source = torch.arange(24, dtype=torch.bfloat16).reshape(2, 4, 3)
    view = view_array(source[:, 1:], DType.BFLOAT16, "it")
    assert (view.address, view.shape, view.strides) == (source.data_ptr() + 6, (2, 3, 3), (24, 6, 2))
    assert view.owner.shape == (2, 3, 3)
    for wrong, message in (
        (source.float(), "has type float32"),
        (source.to("meta"), "device meta"),
        (source.to_sparse(), "sparse"),
        (torch._neg_view(source), "negated"),
    ):
        with pytest.raises(WriteError, match=message):
            view_array(wrong, DType.BFLOAT16, "it")


LAYOUTS: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
    "contiguous": lambda: counting(2, 4, 3),
    "tokens outermost": lambda: counting(4, 2, 3).transpose(1, 0, 2),
    "a slice of more tokens": lambda: counting(2, 9, 3)[:, 5:],
    "every second token": lambda: counting(2, 8, 3)[:, ::2],
    "one of two interleaved tensors": lambda: counting(2, 4, 2, 3)[:, :, 0],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strided_tensors_are_stored_as_they_read(name: str) -> None:
    source = LAYOUTS[name]()
    assert round_trip(source) == np.ascontiguousarray(source).tobytes()


def test_one_token_may_have_any_stride() -> None:
    source = counting(2, 3)
    assert round_trip(source[:, None]) == source.tobytes()
    assert round_trip(counting(3, 2, 1).transpose(1, 2, 0).copy()) == counting(3, 2).T.tobytes()


def round_trip(source: np.ndarray[Any, Any]) -> bytes:
    spec = ModelSpec("toy", "w", 4, (toy_group(),))
    ids = list(range(source.shape[1]))
    with kvstore.open(spec, dram="64KiB") as store:
        with store.write(ids) as writer:
            writer.put(0, tokens=slice(0, len(ids)), t=source)
            writer.commit()
        with store.read(store.match([*ids, 9])) as lease:
            read = lease.layer(0).read("t")
            target = np.zeros_like(source) if source.strides[0] >= 12 else np.zeros(source.shape, np.float32)
            lease.layer(0).copy_to(t=target)
            assert target.tobytes() == read.tobytes()
            return read.tobytes()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (counting(2, 5, 3), r"shape \[2, 5, 3\], expected \[2, 4, 3\] \(\[rows, tokens, \*inner\]\)"),
        (counting(2, 12), "shape"),
        (counting(2, 4, 6)[..., ::2], "gaps in its inner axes"),
        (counting(2, 3, 4).transpose(0, 2, 1), "gaps in its inner axes"),
        (counting(2, 4, 3)[..., ::-1], "gaps in its inner axes"),
        (counting(2, 4, 3)[:, ::-1], "repeats, overlaps or reverses"),
        (counting(2, 4, 3)[::-1], "repeats, overlaps or reverses"),
        (np.broadcast_to(counting(2, 1, 3), (2, 4, 3)), "repeats, overlaps or reverses"),
        (np.lib.stride_tricks.sliding_window_view(counting(2, 6), 3, axis=1), "repeats, overlaps or reverses"),
    ],
)
def test_layouts_that_cannot_be_copied_are_refused(array: Any, message: str) -> None:
    with pytest.raises(WriteError, match=message):
        check(array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (counting(3, 3), r"expected \[2, 3\] \(\[rows, \*inner\]\)"),
        (counting(2, 6)[:, ::2], "gaps in its inner axes"),
        (counting(3, 2).T, "gaps in its inner axes"),
        (counting(2, 3)[::-1], "repeats, overlaps or reverses"),
        (np.broadcast_to(counting(3), (2, 3)), "repeats, overlaps or reverses"),
    ],
)
def test_states_that_cannot_be_copied_are_refused(array: Any, message: str) -> None:
    """A transposed convolution state looks right and lies wrong."""
    with pytest.raises(WriteError, match=message):
        check(array, has_tokens=False)
    assert check(counting(4, 3)[::2], has_tokens=False).strides == (24, 4)


def test_a_read_only_target_is_refused() -> None:
    spec = ModelSpec("toy", "w", 4, (toy_group(),))
    with kvstore.open(spec, dram="64KiB") as store:
        with store.write([1, 2]) as writer:
            writer.put(0, tokens=slice(0, 2), t=counting(2, 2, 3))
            writer.commit()
        with store.read(store.match([1, 2, 3])) as lease:
            target = counting(2, 2, 3)
            target.flags.writeable = False
            with pytest.raises(LeaseError, match="read-only"):
                lease.layer(0).copy_to(t=target)
            with pytest.raises(KVStoreError):
                lease.layer(0).copy_to(t=[[0.0] * 3] * 2)
