"""Naming the weights of a model that is already in memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def weights_digest(model: nn.Module) -> str:
    """A digest over the name, shape, type and bytes of every parameter and buffer: `sha256:...`.

    For `ModelSpec.from_transformers(..., weights=...)`, where no revision or digest of the checkpoint is at hand.
    Reads all weights once, about a second per gigabyte; tensors on a device pass through the host.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"
