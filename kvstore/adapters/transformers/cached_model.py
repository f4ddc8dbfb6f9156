"""A `transformers` model whose prompts go through a store: prefix reuse, generation, hand-over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from kvstore.adapters.transformers.decode import Sampling, Step, decode, pack_logits, unpack_logits
from kvstore.adapters.transformers.decoder import Decoder
from kvstore.adapters.transformers.prefill import Prefiller, PrefillSettings
from kvstore.adapters.transformers.results import CachedModelStatistics, Generated, HandedOver, Prefilled
from kvstore.errors import DeadlineError, LeaseGoneError, PoolError, SpecError, TokenError
from kvstore.pool import HandOver
from kvstore.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import DynamicCache

    from kvstore.adapters.transformers.exporter import LayerEvent
    from kvstore.pool import Prompt
    from kvstore.store import Arrival, Lease, Store

GREEDY = Sampling()
HANDOVER_DEADLINE_S = 60.0


class CachedModel:
    """A causal language model and a store, used together.

        cached = CachedModel(model, store, chunk_tokens=512)
        answer = cached.generate(token_ids, max_new_tokens=64)
        answer.tokens, answer.resumed_tokens, answer.ttft_s

    Prompts are computed in chunks that end at multiples of `chunk_tokens`. With `strict_grid` a result is
    bitwise that of the same model without a store, cut at the same lengths (docs/transformers.md). The
    model's mode, threads and kernels are left as they are. One thread at a time; the store may be shared.

    Args:
        model: a causal language model of `transformers` in evaluation mode.
        store: opened for this model's spec.
        chunk_tokens: tokens per forward pass of a prefill. With states, checkpoints lie at multiples of
            both this and the spec's `block_tokens`, so make one a multiple of the other.
        salt, adapter: what prompts are cached under.
        strict_grid: reuse only what was computed with the same chunk boundaries. If not, any resume point
            serves, and the result is bitwise that of a run with the boundaries of whoever stored it, if only
            one writer did.
        strict_store: raise an error of the store out of `prefill` and `generate`. If not, they go on
            without the store, report the error in their result, count and log it.
        verify_reads: recompute the checksums of everything that is restored.
        trust_spec: the spec was written by hand; do not compare it with the model's configuration.
        listener: called with a `LayerEvent` for each layer and chunk that goes into the store.

    Raises:
        SpecError: the store's spec is not that of the model.
        UnsupportedModelError: the model cannot be cached, or is in training mode.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        store: Store,
        *,
        chunk_tokens: int = 512,
        salt: bytes = b"",
        adapter: str = "",
        strict_grid: bool = True,
        strict_store: bool = False,
        verify_reads: bool = False,
        trust_spec: bool = False,
        listener: Callable[[LayerEvent], None] | None = None,
    ) -> None:
        if chunk_tokens < 1:
            raise SpecError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        if not trust_spec:
            _check_spec(model, store.spec)
        self.store = store
        self._decoder = Decoder(model)
        self._verify_reads = verify_reads
        self._prefiller = Prefiller(
            self._decoder,
            store,
            PrefillSettings(chunk_tokens, salt, adapter, strict_grid, strict_store, verify_reads, listener),
        )

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return self._decoder.vocabulary

    @property
    def statistics(self) -> CachedModelStatistics:
        """Counters since this object was made."""
        return self._prefiller.statistics

    def prefill(
        self,
        token_ids: Any,
        *,
        checkpoints: Sequence[int] | None = None,
        send_to: str | None = None,
        send_options: Mapping[str, Any] | None = None,
    ) -> Prefilled:
        """Compute a prompt, reusing what the store has and storing what it lacks, layer by layer.

        Args:
            token_ids: the prompt, `[tokens]` or `[1, tokens]`.
            checkpoints: lengths at which to store states: ends of chunks and of blocks, or the prompt's end;
                those within the restored part are there already. By default those that the store suggests, each moved
                down to the next possible length.
            send_to: also stream the stored prefix to the node at this address while it is computed.
            send_options: of `Writer.send`, such as `transport=TransportOptions(...)`.

        Raises:
            TokenError: the ids are empty, negative, too large for the model or too many.
            WriteError: a given checkpoint is impossible.
            KVStoreError: the store failed, and `strict_store`.
        """
        return self._prefiller.run(token_ids, checkpoints, send_to, send_options, None)

    def generate(
        self,
        token_ids: Any,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        keep_logits: bool = False,
        checkpoints: Sequence[int] | None = None,
    ) -> Generated:
        """Prefill, then decode.

        Args:
            token_ids: the prompt.
            max_new_tokens: the most tokens to decode, at least 1.
            sampling: how tokens are chosen; the likeliest by default.
            keep_logits: return the logits of every token too.
            checkpoints: as for `prefill`.

        Raises:
            KVStoreError: as for `prefill`.
        """
        _check_count(max_new_tokens)
        started_s = time.monotonic()
        prefilled = self._prefiller.run(token_ids, checkpoints, None, None, None)
        return self._generate(prefilled, max_new_tokens, sampling, keep_logits, started_s)

    def continue_from(
        self, prefilled: Prefilled, max_new_tokens: int, *, sampling: Sampling = GREEDY, keep_logits: bool = False
    ) -> Generated:
        """Decode on from a prefill, whose cache is used up by it."""
        _check_count(max_new_tokens)
        return self._generate(prefilled, max_new_tokens, sampling, keep_logits, time.monotonic())

    def _generate(
        self, prefilled: Prefilled, max_new_tokens: int, sampling: Sampling, keep_logits: bool, started_s: float
    ) -> Generated:
        count = prefilled.prompt_tokens
        first = Step(sampling.choose(prefilled.logits, count), prefilled.logits)
        steps = decode(self._decoder, prefilled.cache, first, count, max_new_tokens, sampling)
        return self._collect(steps, keep_logits, started_s, count, prefilled.resumed_tokens, prefilled)

    def _collect(
        self,
        steps: Iterator[Step],
        keep_logits: bool,
        started_s: float,
        prompt_tokens: int,
        resumed_tokens: int,
        prefilled: Prefilled | None,
    ) -> Generated:
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        first_s = 0.0
        for step in steps:
            first_s = first_s or time.monotonic()
            tokens.append(step.token)
            if keep_logits and step.logits is not None:
                rows.append(step.logits.detach().cpu().float())
        return Generated(
            tokens=tuple(tokens),
            logits=torch.stack(rows) if rows else None,
            ttft_s=first_s - started_s,
            total_s=time.monotonic() - started_s,
            prompt_tokens=prompt_tokens,
            resumed_tokens=resumed_tokens,
            prefilled=prefilled,
        )

    def hand_over(
        self,
        token_ids: Any,
        address: str,
        *,
        sampling: Sampling = GREEDY,
        with_logits: bool = True,
        checkpoints: Sequence[int] | None = None,
        send_options: Mapping[str, Any] | None = None,
    ) -> HandedOver:
        """Prefill a prompt for another process to decode: its cache streams there while it is computed.

        Args:
            token_ids: the prompt.
            address: of the other process's store: `tcp://decode-3:7400`.
            sampling: how the first token is chosen.
            with_logits: send what it was chosen from along, as float32.
            checkpoints: further lengths at which to store states; the prompt's end is always one.
            send_options: of `Writer.send`.

        Raises:
            KVStoreError: as for `prefill`. Without `strict_store` a hand-over that failed shows in `wait`.
        """
        first_tokens: list[int] = []

        def sample(logits: torch.Tensor, prompt_tokens: int) -> HandOver:
            first_tokens.append(sampling.choose(logits, prompt_tokens))
            return HandOver(first_tokens[0], pack_logits(logits) if with_logits else b"")

        prefilled = self._prefiller.run(token_ids, checkpoints, address, send_options, sample)
        if not first_tokens:
            sample(prefilled.logits, prefilled.prompt_tokens)
        return HandedOver(first_tokens[0], prefilled, prefilled.transfer)

    def resume(
        self,
        token_ids: Any,
        max_new_tokens: int,
        *,
        deadline_s: float = HANDOVER_DEADLINE_S,
        sampling: Sampling = GREEDY,
        keep_logits: bool = False,
    ) -> Generated:
        """Wait for a prompt that another process hands over to this one, and decode it.

        Args:
            token_ids: the whole prompt.
            max_new_tokens: the most tokens, the first of which was sampled there.
            deadline_s: how long to wait for the hand-over.
            sampling: how the tokens after the first are chosen.
            keep_logits: return the logits too; the first row only if they were sent along.

        Raises:
            DeadlineError: nothing was handed over in time.
            KVStoreError: the store failed; there is nothing to go on with, so this always raises.
        """
        _check_count(max_new_tokens)
        prompt = self._prefiller.prompt(token_ids)
        arrival = self._arrival(prompt, deadline_s)
        started_s = time.monotonic()
        count = len(prompt)
        with arrival.lease as lease:
            if self._verify_reads and lease.verify():
                raise LeaseGoneError(f"what was handed over at {count} tokens is damaged; have it handed over again")
            cache = self.restore(lease)
        logits = unpack_logits(arrival.handover.payload, self.vocabulary)
        first = Step(arrival.handover.first_token, logits)
        steps = decode(self._decoder, cache, first, count, max_new_tokens, sampling)
        return self._collect(steps, keep_logits, started_s, count, count, None)

    def _arrival(self, prompt: Prompt, deadline_s: float) -> Arrival:
        waiting = self.store.accept(prompt)
        try:
            return waiting.result(deadline_s)
        except DeadlineError as late:
            waiting.cancel("the deadline passed")
            try:
                return waiting.result(0.0)  # it may have come at the last moment
            except PoolError:
                raise late from None
        finally:
            # A wait that is given up must not take the hand-over away from the next one.
            waiting.cancel("the caller has gone")

    def restore(self, lease: Lease) -> DynamicCache:
        """A new cache from a lease, on the model's device; the lease may then be released."""
        return self._prefiller.restore(lease)


def _check_count(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise TokenError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _check_spec(model: torch.nn.Module, spec: ModelSpec) -> None:
    """The store's spec must be what the model's own configuration gives."""
    expected = ModelSpec.from_transformers(
        model.config, weights=spec.weights, block_tokens=spec.block_tokens, dtype=next(model.parameters()).dtype
    )
    if (spec.model, spec.groups) != (expected.model, expected.groups) or not set(expected.numerics) <= set(
        spec.numerics
    ):
        raise SpecError(
            f"the store holds caches of {spec.model!r}, whose spec is not that of this {expected.model!r}: groups, "
            "element types or configuration differ. Open a store with ModelSpec.from_transformers(model.config, ...)"
        )
