"""The seam between what is measured and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.profile import KvSize


class Subject(ABC):
    """A model on a machine, as far as measuring needs it. Used by one thread.

    Attributes:
        name: what its profile is called by default.
        origin: model, weights, number type, device: what a reader of the profile must know.
        kv: S_kv by its model spec.
        tokens_max: the longest prompt that it takes.
        accelerators: that it runs on.
    """

    name: str
    origin: str
    kv: KvSize
    tokens_max: int
    accelerators: int

    @abstractmethod
    def prefill_s(self, tokens: int) -> float:
        """Seconds of prefilling one prompt of this length, alone, from nothing.

        Raises:
            ProfileError: it does not fit.
        """

    @abstractmethod
    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the tensors that a cache holds after such a prefill."""

    @abstractmethod
    def decode_steps_s(self, requests: int, context_tokens: int, steps: int) -> tuple[float, ...]:
        """Seconds of each of some decode steps of a batch whose requests have seen `context_tokens` each.

        Raises:
            ProfileError: it does not fit.
        """
