"""The excerpts that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

DATA = Path(__file__).parents[1] / "data"


def bundled(kind: Literal["mooncake", "agentic"]) -> Path:
    """Where the excerpt of a kind of trace lies; its licence is beside it."""
    return DATA / "mooncake" / "conversation_1000.jsonl.gz" if kind == "mooncake" else DATA / "agentic"
