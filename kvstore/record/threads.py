"""How many threads a copy may use."""

from __future__ import annotations

import os

from kvstore.limits import COPY_BYTES_PER_THREAD_MIN, COPY_THREADS_DEFAULT, COPY_THREADS_MAX


def copy_threads(size_bytes: int) -> int:
    """How many threads a copy of so many bytes is worth: never more than this process has processors.

    The environment variable `KVSTORE_COPY_THREADS`, read at import, sets the most (`COPY_THREADS_DEFAULT` without it);
    1 keeps every copy on the thread that asked for it.
    """
    worth = size_bytes // COPY_BYTES_PER_THREAD_MIN
    if worth < 2 or THREADS_ALLOWED == 1:
        return 1
    return min(worth, THREADS_ALLOWED, len(os.sched_getaffinity(0)))


def threads_allowed(setting: str) -> int:
    """What `KVSTORE_COPY_THREADS` says.

    Raises:
        ImportError: it is no number from 1 to `COPY_THREADS_MAX`; an import fails as for a wrong `KVSTORE_COPY`.
    """
    if not setting:
        return COPY_THREADS_DEFAULT
    if not setting.isdecimal() or not 1 <= int(setting) <= COPY_THREADS_MAX:
        raise ImportError(
            f"KVSTORE_COPY_THREADS={setting} is no number of threads; set it to 1 to {COPY_THREADS_MAX}, or unset it"
        )
    return int(setting)


THREADS_ALLOWED = threads_allowed(os.environ.get("KVSTORE_COPY_THREADS", ""))
