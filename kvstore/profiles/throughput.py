"""KV throughput of six models as the paper printed it (docs/profiles.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class PublishedThroughput:
    """One row of the table: one model on one instance of eight H200.

    Attributes:
        model: as the paper calls it.
        profile: name of its profile in the package.
        is_dense: whether every layer attends to everything.
        gbps: Φ_kv in 10^9 bits per second by prompt tokens, as printed.
    """

    model: str
    profile: str
    is_dense: bool
    gbps: tuple[tuple[int, float], ...]


def published_kv_throughput() -> tuple[PublishedThroughput, ...]:
    """The table, in the order of the paper."""
    file = resources.files("kvstore.profiles").joinpath("tables", "kv_throughput.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    lengths = document["lengths_tokens"]
    return tuple(
        PublishedThroughput(
            row["model"], row["profile"], row["is_dense"], tuple(zip(lengths, row["gbps"], strict=True))
        )
        for row in document["rows"]
    )
