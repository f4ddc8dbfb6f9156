"""Telling systemd how it goes (sd_notify(3)): a datagram to the socket that the environment names."""

from __future__ import annotations

import logging
import os
import socket

LOG = logging.getLogger("kvstore.node")
SEND_S = 1.0


def notify_supervisor(state: str) -> bool:
    """Send `READY=1` or `STOPPING=1`. False if no supervisor asked for it, or it cannot be reached."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    # A leading @ stands for the zero byte of Linux's abstract names.
    name = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(SEND_S)
            sock.sendto(state.encode(), name)
    except OSError as error:
        LOG.warning("the supervisor at %s was not told %s: %s", path, state, error)
        return False
    return True
