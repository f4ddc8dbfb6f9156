"""What several tests of transfers share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["tcp", "tcp, python", "memory"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pieces move natively over sockets, otherwise in Python; the latter can be forced for sockets, too."""
    name, _, path = request.param.partition(", ")
    monkeypatch.setenv("KVSTORE_TRANSFER", path)
    return str(name)
