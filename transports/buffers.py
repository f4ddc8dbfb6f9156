"""What callers hand to a connection, as flat byte views."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvstore.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def byte_view(buffer: bytes | bytearray | memoryview, *, is_target: bool = False) -> memoryview:
    """A new flat view of `buffer`, to be released by the caller.

    Raises:
        TransportError: the buffer is not contiguous, or is a target and cannot be written.
    """
    view = memoryview(buffer)
    if not view.c_contiguous:
        view.release()
        raise TransportError("a buffer is not contiguous, and a transport does not copy; pass its contiguous parts")
    if is_target and view.readonly:
        view.release()
        raise TransportError("a buffer to receive into is read-only; pass writable memory")
    if view.nbytes == 0:
        view.release()
        return memoryview(b"")
    if view.ndim == 1 and view.format == "B":
        return view
    flat = view.cast("B")
    view.release()
    return flat


@contextmanager
def byte_views(
    buffers: Sequence[bytes | bytearray | memoryview], *, is_target: bool = False
) -> Iterator[list[memoryview]]:
    """The buffers that are not empty, as flat views in a list that the caller may shorten and replace.

    What the list holds at the end is released, so that not even the frames of a traceback keep the
    caller's memory from being freed.

    Raises:
        TransportError: as `byte_view`.
    """
    views: list[memoryview] = []
    try:
        for buffer in buffers:
            view = byte_view(buffer, is_target=is_target)
            if view.nbytes:
                views.append(view)
        yield views
    finally:
        for view in views:
            view.release()
