"""One prefill through a store: match, restore, compute the rest layer by layer into the store, commit."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers.cache_io import restore_cache
from kvstore.adapters.transformers.decoder import decoder_layers
from kvstore.adapters.transformers.exporter import LayerExporter
from kvstore.adapters.transformers.plan import plan_prefill
from kvstore.adapters.transformers.results import CachedModelStatistics, Prefilled, PrefillTimes
from kvstore.errors import KVStoreError, LeaseGoneError, TokenError
from kvstore.spec import ChunkGrid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvstore.adapters.transformers.decoder import Decoder
    from kvstore.adapters.transformers.exporter import LayerEvent
    from kvstore.adapters.transformers.plan import PrefillPlan
    from kvstore.handle import Handle
    from kvstore.pool import HandOver, Match, Prompt
    from kvstore.store import Lease, Store, Writer
    from kvstore.transfer import TransferReport

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 3
"""A match may be evicted before it is read; so often it is asked for again."""


@dataclass(frozen=True)
class PrefillSettings:
    """As the arguments of `CachedModel`."""

    chunk_tokens: int
    salt: bytes
    adapter: str
    strict_grid: bool
    strict_store: bool
    verify_reads: bool
    listener: Callable[[LayerEvent], None] | None


class Prefiller:
    """Computes prompts for `CachedModel`, which documents it."""

    def __init__(self, decoder: Decoder, store: Store, settings: PrefillSettings) -> None:
        decoder_layers(decoder.model)
        self.statistics = CachedModelStatistics()
        self._decoder = decoder
        self._config: Any = decoder.model.config
        self._store = store
        self._spec = store.spec
        self._settings = settings

    def prompt(self, token_ids: Any) -> Prompt:
        """A prompt with its keys, its ids checked against the store's limits and the model's vocabulary."""
        prompt = self._store.prompt(token_ids, salt=self._settings.salt, adapter=self._settings.adapter)
        largest = int(prompt.token_ids.max())
        if largest >= self._decoder.vocabulary:
            raise TokenError(f"token id {largest} is outside the model's vocabulary of {self._decoder.vocabulary}")
        return prompt

    def restore(self, lease: Lease) -> DynamicCache:
        """A new cache from a lease, on the model's device."""

        def fill(layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
            lease.layer(layer).copy_to(**tensors)

        return restore_cache(self._config, self._spec, lease.tokens, fill, self._decoder.device)

    def run(
        self,
        token_ids: Any,
        checkpoints: Sequence[int] | None,
        send_to: str | None,
        send_options: Mapping[str, Any] | None,
        sample: Callable[[torch.Tensor, int], HandOver] | None,
    ) -> Prefilled:
        """One prefill; with `sample` a hand-over, whose first token it chooses from the logits."""
        started_s = time.monotonic()
        prompt = self.prompt(token_ids)
        settings = self._settings
        errors: list[KVStoreError] = []
        with ExitStack() as stack:
            match, lease = self._find(prompt, errors)
            if lease is not None:
                stack.enter_context(lease)
            matched_s = time.monotonic()
            cache, resumed = self._restore(lease, errors)
            restored_s = time.monotonic()
            plan = plan_prefill(
                self._spec,
                prompt_tokens=len(prompt),
                resume_tokens=resumed,
                chunk_tokens=settings.chunk_tokens,
                strict_grid=settings.strict_grid,
                is_grid_known=resumed == 0 or (match is not None and match.grid is not None),
                wanted=_suggested(match, len(prompt)) if checkpoints is None else checkpoints,
                are_exact=checkpoints is not None,
                is_handover=sample is not None,
            )
            writer = self._writer(prompt, plan, lease if resumed else None, errors)
            if writer is not None:
                stack.enter_context(writer)
            transfer = self._send(writer, send_to, send_options, errors)
            # Nothing of the lease is read any more, and the writer holds the path from here on.
            if lease is not None:
                lease.release()
            computed = self._compute(prompt, plan, cache, writer, sample, errors)
        prefilled = Prefilled(
            cache=cache,
            logits=computed.logits,
            prompt_tokens=len(prompt),
            match=match,
            resumed_tokens=resumed,
            stored_tokens=plan.stored_tokens if computed.is_stored else 0,
            checkpoints=plan.checkpoints if computed.is_stored else (),
            error=errors[0] if errors else None,
            transfer=transfer,
            times=PrefillTimes(
                started_s, matched_s, restored_s, computed.computed_s, time.monotonic(), computed.export_s
            ),
        )
        self._count(prefilled)
        return prefilled

    def _find(self, prompt: Prompt, errors: list[KVStoreError]) -> tuple[Match | None, Lease | None]:
        """The best resume point that this model may use, pinned."""
        match = None
        for _ in range(READ_ATTEMPTS):
            try:
                match = self._match(prompt)
                return match, self._store.read(match, verify=self._settings.verify_reads) if match else None
            except LeaseGoneError as error:
                logger.info("matching again: %s", error)
            except KVStoreError as error:
                self._failed(error, errors)
                break
        return match, None

    def _match(self, prompt: Prompt) -> Match:
        own = self._store.match(prompt, grid=ChunkGrid.every(self._settings.chunk_tokens, upto=len(prompt)))
        if self._settings.strict_grid:
            return own
        # A resume point on the own grid is as good as any other of its length, and its grid is known.
        foreign = self._store.match(prompt)
        return foreign if foreign.tokens > own.tokens else own

    def _restore(self, lease: Lease | None, errors: list[KVStoreError]) -> tuple[DynamicCache, int]:
        if lease is not None:
            try:
                return self.restore(lease), lease.tokens
            except KVStoreError as error:
                self._failed(error, errors)
        return DynamicCache(config=self._config), 0

    def _writer(
        self, prompt: Prompt, plan: PrefillPlan, lease: Lease | None, errors: list[KVStoreError]
    ) -> Writer | None:
        if not plan.checkpoints:
            return None
        stored = plan.stored_tokens
        try:
            target = prompt if stored == len(prompt) else self.prompt(prompt.token_ids[:stored])
            return self._store.write(target, resume_at=plan.checkpoints, resume=lease, grid=plan.grid)
        except KVStoreError as error:
            self._failed(error, errors)
            return None

    def _send(
        self,
        writer: Writer | None,
        address: str | None,
        options: Mapping[str, Any] | None,
        errors: list[KVStoreError],
    ) -> Handle[TransferReport] | None:
        if writer is None or address is None:
            return None
        try:
            return writer.send(address, **(options or {}))
        except KVStoreError as error:
            self._failed(error, errors)
            return None

    def _compute(
        self,
        prompt: Prompt,
        plan: PrefillPlan,
        cache: DynamicCache,
        writer: Writer | None,
        sample: Callable[[torch.Tensor, int], HandOver] | None,
        errors: list[KVStoreError],
    ) -> _Computed:
        """Run the chunks, exporting those that are stored, and commit as soon as the last of these is there."""
        ids = torch.from_numpy(prompt.token_ids.astype("int64"))
        logits: torch.Tensor | None = None
        export_s = 0.0
        is_stored = False
        rest = list(plan.chunks)
        if writer is not None:
            settings = self._settings
            with LayerExporter(
                self._decoder.model, self._spec, writer, strict=settings.strict_store, listener=settings.listener
            ) as exporter:
                while rest and rest[0][1] <= plan.stored_tokens:
                    start, end = rest.pop(0)
                    with exporter.chunk(start, end):
                        logits = self._decoder.run(ids[start:end], cache, start)
            export_s = exporter.seconds
            if exporter.error is not None:
                self._failed(exporter.error, errors)
            elif rest:
                is_stored = self._commit(writer, None, errors)
        for start, end in rest:
            logits = self._decoder.run(ids[start:end], cache, start)
        assert logits is not None, "a prefill computes at least one token"
        computed_s = time.monotonic()
        if writer is not None and not rest and exporter.error is None:
            handover = sample(logits, len(prompt)) if sample is not None else None
            is_stored = self._commit(writer, handover, errors)
        return _Computed(logits, is_stored, export_s, computed_s)

    def _commit(self, writer: Writer, handover: HandOver | None, errors: list[KVStoreError]) -> bool:
        try:
            writer.commit(handover=handover)
        except KVStoreError as error:
            writer.abort(f"the commit failed: {error}")
            self._failed(error, errors)
            return False
        return True

    def _failed(self, error: KVStoreError, errors: list[KVStoreError]) -> None:
        """The store failed: raise, or go on without it, visibly."""
        if self._settings.strict_store:
            raise error
        errors.append(error)
        logger.warning("going on without the store: %s: %s", type(error).__name__, error)

    def _count(self, prefilled: Prefilled) -> None:
        counters = self.statistics
        counters.prefills += 1
        counters.resumed_tokens += prefilled.resumed_tokens
        counters.computed_tokens += prefilled.computed_tokens
        if prefilled.error is not None:
            counters.store_errors += 1
            counters.last_error = prefilled.error


def _suggested(match: Match | None, prompt_tokens: int) -> tuple[int, ...]:
    suggested = match.suggested if match is not None else (prompt_tokens,)
    # The same prompt again can use all but its last token, whose logits it needs.
    return (*suggested, prompt_tokens - 1)


@dataclass(frozen=True)
class _Computed:
    logits: torch.Tensor
    is_stored: bool
    export_s: float
    computed_s: float
