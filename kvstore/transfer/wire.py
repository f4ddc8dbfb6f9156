"""Bounds-checked reading, as the transfer's messages use it."""

from kvstore.wire import Reader, check_zero, clipped_utf8

__all__ = ["Reader", "check_zero", "clipped_utf8"]
