"""What a cached model reports: what was reused, what was computed and stored, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kvstore.errors import KVStoreError
    from kvstore.handle import Handle
    from kvstore.pool import Match
    from kvstore.transfer import TransferReport


@dataclass(frozen=True)
class PrefillTimes:
    """Moments of one prefill on the monotonic clock, in seconds, in this order.

    Attributes:
        started_s: it was asked for.
        matched_s: the store had said what is there.
        restored_s: the cache was filled from it.
        computed_s: the logits after the last token were there.
        stored_s: the store had committed what was computed, or had failed to.
        export_s: how long (not when) the layers waited for the store while they were computed.
    """

    started_s: float
    matched_s: float
    restored_s: float
    computed_s: float
    stored_s: float
    export_s: float


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been computed, and the cache to decode on from.

    Attributes:
        cache: a `DynamicCache` that has seen the whole prompt.
        logits: after the last token, `[vocabulary]`.
        prompt_tokens: length of the prompt.
        match: what the store answered; None if it could not be asked.
        resumed_tokens: length of the prefix that was restored instead of computed.
        stored_tokens: length of the prefix that the store holds now as a resume point because of this
            prefill; 0 if there was nothing new to store, or it failed.
        checkpoints: lengths at which states were stored.
        error: why the store was not used to the full, if it was not. The result is right all the same.
        transfer: the stream to another node, if one was asked for and could be begun.
        times: when what happened.
    """

    cache: Any
    logits: torch.Tensor
    prompt_tokens: int
    match: Match | None
    resumed_tokens: int
    stored_tokens: int
    checkpoints: tuple[int, ...]
    error: KVStoreError | None
    transfer: Handle[TransferReport] | None
    times: PrefillTimes

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.resumed_tokens


@dataclass(frozen=True)
class Generated:
    """Decoded tokens.

    Attributes:
        tokens: their ids, without the prompt.
        logits: what each was chosen from, float32 `[tokens, vocabulary]`; None unless asked for. Of a
            hand-over without logits the first row is missing.
        ttft_s: from the call to the first token.
        total_s: from the call to the last token.
        prompt_tokens: length of the prompt.
        resumed_tokens: length of the prefix that was restored instead of computed.
        prefilled: the prefill before it; None after a hand-over.
    """

    tokens: tuple[int, ...]
    logits: torch.Tensor | None
    ttft_s: float
    total_s: float
    prompt_tokens: int
    resumed_tokens: int
    prefilled: Prefilled | None


@dataclass(frozen=True)
class HandedOver:
    """A prompt that was prefilled here for another process to decode.

    Attributes:
        first_token: the first sampled token.
        prefilled: the prefill; decode on from it here should the hand-over fail.
        transfer: resolves when the other process has committed everything; None if it could not be begun
            (`prefilled.error` says why).
    """

    first_token: int
    prefilled: Prefilled
    transfer: Handle[TransferReport] | None

    def wait(self, deadline_s: float) -> TransferReport:
        """Block until the other process has everything.

        Raises:
            KVStoreError: the store could not take the prompt, the transfer failed, or it did not end in
                time (`DeadlineError`).
        """
        if self.transfer is None:
            assert self.prefilled.error is not None
            raise self.prefilled.error
        return self.transfer.result(deadline_s)


@dataclass
class CachedModelStatistics:
    """Counters of one cached model.

    Attributes:
        prefills: prompts computed.
        resumed_tokens: tokens restored instead of computed.
        computed_tokens: tokens of prompts that were computed.
        store_errors: prefills in which the store failed in some way.
        last_error: the latest of those failures.
    """

    prefills: int = 0
    resumed_tokens: int = 0
    computed_tokens: int = 0
    store_errors: int = 0
    last_error: KVStoreError | None = None
