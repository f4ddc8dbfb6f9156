"""S_kv of a model spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import ProfileError
from kvstore.profile import KvSize
from kvstore.spec.group import ReuseRule

if TYPE_CHECKING:
    from kvstore.spec import ModelSpec


def kv_size_of(spec: ModelSpec) -> KvSize:
    """Bytes of the caches that a spec describes, by length.

    Raises:
        ProfileError: windows of several lengths, which a profile cannot say.
    """
    state_bytes = token_bytes = window_token_bytes = 0
    windows: set[int] = set()
    for group in spec.groups:
        if group.rule is ReuseRule.ATTENTION:
            token_bytes += group.prefix_bytes(1)
        elif group.window_tokens is None:
            state_bytes += group.prefix_bytes(1)
        else:
            windows.add(group.window_tokens)
            window_token_bytes += group.prefix_bytes(1)
    if len(windows) > 1:
        raise ProfileError(
            f"{spec.model} has windows of {', '.join(map(str, sorted(windows)))} tokens; a profile knows one length of "
            "window: write kv_bytes by hand, with the longest"
        )
    return KvSize(state_bytes, token_bytes, window_token_bytes, max(windows, default=0))
