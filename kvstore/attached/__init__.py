"""One pool for several processes of a host: an owner, and processes that attach to it (docs/attach.md)."""

from kvstore.attached.owner import Owner
from kvstore.attached.pool import AttachedPool
from kvstore.attached.session import SessionState

__all__ = ["AttachedPool", "Owner", "SessionState"]
