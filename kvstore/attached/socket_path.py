"""A Unix socket's path: one owner at a time, and nothing of a dead one in the way."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from contextlib import suppress

from kvstore.errors import AttachError

PATH_BYTES_MAX = 107
"""`sun_path` of the kernel, less its end."""
BACKLOG = 64
_SUFFIX = ".new"


class ListeningSocket:
    """A bound socket that belongs to this process alone. Lives as long as the lock on `PATH.lock` is held.

    Args:
        path: where; the folder must exist.
        is_open_to_all: let every user connect; who is welcome is then decided by credentials.

    Raises:
        AttachError: another owner is there, something else is there, or the path cannot be used.
    """

    def __init__(self, path: str, *, is_open_to_all: bool = False) -> None:
        size_bytes, limit = len(os.fsencode(path)), PATH_BYTES_MAX - len(_SUFFIX)
        if size_bytes > limit:
            raise AttachError(
                f"the socket path {path!r} has {size_bytes} bytes, the limit is {limit}; use a folder with a shorter "
                "name, such as /run/kvstore"
            )
        self.path = path
        self._lock_path = self.path + ".lock"
        self._lock = self._take_lock()
        try:
            self._remove_remains()
            self.socket = self._listen(is_open_to_all)
        except BaseException as error:
            self._drop_lock()
            if isinstance(error, OSError):
                raise AttachError(
                    f"no socket can be made at {self.path}: {error.strerror}; use a folder that this user can write"
                ) from error
            raise

    def _take_lock(self) -> int:
        while True:
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise AttachError(
                    f"{self._lock_path} cannot be made: {error.strerror}; make its folder first, writable for this user"
                ) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been removed between open and lock by an owner that was closing.
                if os.fstat(lock).st_ino == os.stat(self._lock_path).st_ino:
                    return lock
            except BlockingIOError as error:
                os.close(lock)
                raise AttachError(
                    f"another owner serves {self.path}; attach to it with kvstore.attach, or use another path"
                ) from error
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _remove_remains(self) -> None:
        """With the lock in hand, a socket that is there was left by an owner that died."""
        for path in (self.path, self.path + _SUFFIX):
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISSOCK(mode):
                raise AttachError(f"{path} is there and is no socket; remove it, or use another path")
            os.unlink(path)

    def _listen(self, is_open_to_all: bool) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Nobody can connect before the mode is right: the name appears afterwards.
            listening.bind(self.path + _SUFFIX)
            os.chmod(self.path + _SUFFIX, 0o666 if is_open_to_all else 0o600)
            listening.listen(BACKLOG)
            listening.setblocking(False)
            os.rename(self.path + _SUFFIX, self.path)
        except BaseException:
            listening.close()
            raise
        return listening

    def close(self) -> None:
        """Remove the socket and let the next owner have the path. Idempotent."""
        if self._lock < 0:
            return
        self.socket.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._drop_lock()

    def _drop_lock(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._lock_path)
        os.close(self._lock)
        self._lock = -1

    def close_in_child(self) -> None:
        """After a fork: the parent goes on with the socket and the lock."""
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
