"""One owner per directory."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from kvstore.errors import SsdDirectoryError
from kvstore.tiers.ssd.names import LOCK

_PID_BYTES_MAX = 32


class DirectoryLock:
    """Held by this process until `close`, or until it ends. A forked child does not hold it.

    Raises:
        SsdDirectoryError: another process holds it (the message names its pid), or the file cannot be made.
    """

    def __init__(self, directory: str) -> None:
        path = Path(directory) / LOCK
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SsdDirectoryError(
                f"{path} cannot be made: {error.strerror}; the directory must be there and writable, or be opened "
                "read-only"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._descriptor, _PID_BYTES_MAX, 0).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            owner = f"process {pid}" if pid.isdigit() else "another process"
            raise SsdDirectoryError(
                f"{directory} is in use by {owner}; stop it, or give this store a directory of its own"
            ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise SsdDirectoryError(f"{path} cannot be locked: {error.strerror}; use a local file system") from error
        _held.add(self)
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            # The pid is for the message of a second owner only; a full or read-only disk says so soon enough.
            self.close()
            raise SsdDirectoryError(
                f"{path} cannot be written: {error.strerror}; make room, or open read-only"
            ) from error

    def close(self) -> None:
        """Let the directory go. Idempotent."""
        if self._descriptor >= 0:
            # Also when a child that was just forked has not closed its descriptor yet.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptor without letting the directory go, if somebody else holds it by the same open file."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # The lock belongs to the open file, which parent and child share: a child would keep a dead parent's.
    for lock in list(_held):
        lock.abandon()


os.register_at_fork(after_in_child=_close_in_child)
