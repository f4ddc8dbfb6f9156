"""What `kvstore doctor` finds out about sharing a pool between processes: each part is tried, not looked up."""

from __future__ import annotations

import os
import socket
from contextlib import closing

from kvstore.cli.finding import Finding
from kvstore.errors import AttachError

_NEEDED = "processes cannot attach without it: kvstore.open(socket=...) needs Linux 5.3 or later"


def process_findings() -> list[Finding]:
    return [_pidfd(), _descriptors()]


def _pidfd() -> Finding:
    """Whether the end of another process can be noticed."""
    name, offered = "attach.pidfd", "the end of an attached process is noticed by pidfd"
    try:
        # On use: `kvstore doctor` also speaks where the native module does not load.
        from kvstore.attached.peer import has_ended, peer_of, watch_process

        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with near, far:
            peer = peer_of(near)
            pidfd = watch_process(near, peer)
        ended = has_ended(pidfd)
        os.close(pidfd)
    except (AttachError, ImportError, OSError, AttributeError) as error:
        return Finding(name, False, str(error), why_not_better=_NEEDED)
    if peer.pid != os.getpid() or ended:
        return Finding(name, False, f"the kernel names process {peer.pid} instead of {os.getpid()}", "", _NEEDED)
    return Finding(name, True, offered, in_use="by owners and attached processes")


def _descriptors() -> Finding:
    """Whether memory can be given to another process, and taken back by a word in it."""
    name = "attach.memory"
    try:
        from kvstore.attached.term import TermPage, TermView

        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with near, far, closing(TermPage()) as page:
            socket.send_fds(near, [b"x"], [page.descriptor])
            _, descriptors, _, _ = socket.recv_fds(far, 1, 1)
            view = TermView(descriptors[0])
            os.close(descriptors[0])
            works = view.term == 1 and page.end_term() == view.term == 2
            view.close()
    except (ImportError, OSError, AttributeError, IndexError) as error:
        return Finding(name, False, f"memfd, seals or SCM_RIGHTS fail: {error}", why_not_better=_NEEDED)
    if not works:
        return Finding(name, False, "memory that was passed on is not the same memory", why_not_better=_NEEDED)
    return Finding(name, True, "memfd with seals, passed by SCM_RIGHTS", in_use="by owners and attached processes")
