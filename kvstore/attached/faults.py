"""Errors on their way between processes: a number and a message."""

from __future__ import annotations

import struct

from kvstore import errors
from kvstore.attached.tables import MessageReader
from kvstore.limits import ATTACH_TEXT_BYTES_MAX
from kvstore.wire import clipped_utf8

_ERROR = struct.Struct("<HHI")
_CODES: dict[int, type[errors.KVStoreError]] = {
    0: errors.KVStoreError,
    1: errors.SpecError,
    2: errors.TokenError,
    3: errors.RecordError,
    4: errors.PoolError,
    5: errors.PoolFullError,
    6: errors.RecordTooLargeError,
    7: errors.WriteTooLargeError,
    8: errors.QuarantineFullError,
    9: errors.StaleSlotError,
    10: errors.WriteError,
    11: errors.LeaseError,
    12: errors.LeaseGoneError,
    13: errors.StoreClosedError,
    14: errors.UnavailableError,
    15: errors.DeadlineError,
    16: errors.AttachError,
    17: errors.AttachProtocolError,
    18: errors.OwnerGoneError,
    19: errors.JointCommitError,
    20: errors.ArenaError,
    21: errors.LoadFailedError,
    22: errors.QuotaError,
    23: errors.QuotaTooSmallError,
    24: errors.PinLimitError,
}
_NUMBERS = {kind: number for number, kind in _CODES.items()}


def pack_error(error: BaseException) -> bytes:
    """The nearest kind that the other side knows, and the message."""
    number = next((_NUMBERS[kind] for kind in type(error).__mro__ if kind in _NUMBERS), 0)
    text = str(error) if isinstance(error, errors.KVStoreError) else f"{type(error).__name__}: {error}"
    message = clipped_utf8(text, ATTACH_TEXT_BYTES_MAX)
    return _ERROR.pack(number, 0, len(message)) + message


def parse_error(data: memoryview) -> errors.KVStoreError:
    """The error that the other side raised.

    Raises:
        AttachProtocolError: it is none.
    """
    reader = MessageReader(data, "ERROR")
    number, zero, size_bytes = reader.fixed(_ERROR)
    if number not in _CODES or zero or size_bytes > ATTACH_TEXT_BYTES_MAX:
        raise reader.fail(f"has the unknown code {number}, or {size_bytes} bytes of text")
    text = reader.text(size_bytes)
    reader.finish()
    return _CODES[number](text)
