"""How many bytes differ."""

import torch


def differing_bytes(left: bytes, right: bytes) -> int:
    """Bytes that differ; what one has beyond the other's end counts too."""
    both = min(len(left), len(right))
    count = max(len(left), len(right)) - both
    if both and left[:both] != right[:both]:
        ours, theirs = (torch.frombuffer(bytearray(each[:both]), dtype=torch.uint8) for each in (left, right))
        count += int((ours != theirs).sum())
    return count
