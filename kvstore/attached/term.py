"""One number in shared memory by which an owner takes back what a process holds, whether that process listens or not.

What a process reads in the arena is only its own while the term under which it holds it lasts. The owner ends the term
*before* it reuses anything, so a reader that copies and then finds the term unchanged has copied what it meant to.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TERM_PAGE_BYTES = 4096
TERM_CLOSED = 0
"""The owner closed the pool, or parted from the process."""
_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; the fcntl module of Python 3.11 does not name it


class TermPage:
    """The owner's side: one page per process. `descriptor` may be given away, it cannot be mapped writable any more."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("kvstore-term", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, TERM_PAGE_BYTES)
        self._page = mmap.mmap(self.descriptor, TERM_PAGE_BYTES)
        self._words = memoryview(self._page).cast("Q")
        self._words[0] = 1
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)

    @property
    def term(self) -> int:
        return self._words[0]

    def end_term(self) -> int:
        """What is held under the present term is void from here on; the next term."""
        self._words[0] += 1
        return self._words[0]

    def end_last_term(self) -> int:
        """As `end_term`, and no other term follows."""
        self._words[0] = TERM_CLOSED
        return TERM_CLOSED

    def close(self) -> None:
        """End the last term. Idempotent."""
        if self.descriptor < 0:
            return
        self._words[0] = TERM_CLOSED
        self._words.release()
        self._page.close()
        os.close(self.descriptor)
        self.descriptor = -1


class TermView:
    """The process's side."""

    def __init__(self, descriptor: int) -> None:
        page = mmap.mmap(descriptor, TERM_PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        self._words: Sequence[int] = memoryview(page).cast("Q")

    @property
    def term(self) -> int:
        """The present term; `TERM_CLOSED` once there is none."""
        return self._words[0]

    def close(self) -> None:
        """There is no term any more."""
        self._words = (TERM_CLOSED,)  # whoever reads it just now has the old one, and with it the page
