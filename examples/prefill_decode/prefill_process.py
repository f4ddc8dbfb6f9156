"""The prefill process: computes prompts and streams their cache away while it does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

import kvstore
from kvstore.adapters.transformers import CachedModel, LayerEvent, LayerExporter
from kvstore.transfer import TransferObserver

from .model import cache_bytes, describe_groups, layer_words, load_model
from .prompts import checkpoint_lengths, make_prompts
from .uncached import forward, run_uncached
from .values import Bar, Matched, Prompt, Ready, Sent, Uncached

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from kvstore.pool import Match
    from kvstore.transfer import TransferReport

    from .arguments import Options
    from .child import Report

TRANSFER_DEADLINE_S = 600.0
DRAM_PROMPTS = 5
"""So many prompts of the largest size must fit into each store."""


def serve_prefill(connection: Connection, options: Options) -> None:
    """Main function of the process."""
    from .child import serve

    serve(connection, options, PrefillProcess)


class PrefillProcess:
    """The model, a store, and what the parent may ask for. Closed by leaving the `with` block."""

    def __init__(self, options: Options, progress: Report) -> None:
        progress("building the model")
        torch.set_num_threads(1)
        self._options = options
        self._progress = progress
        self._loaded = load_model(options)
        self._model = self._loaded.model
        self._spec = self._loaded.spec
        self._store = kvstore.open(self._spec, dram=dram_bytes(options, self._spec))
        self._bars: list[Bar] = []
        self._last_layer = self._spec.layers[-1]
        self._prompt_tokens = 1
        self._doing = ""
        self._cached = CachedModel(
            self._model,
            self._store,
            chunk_tokens=options.chunk_tokens,
            strict_store=True,
            listener=self._layer_computed,
        )

    def __enter__(self) -> PrefillProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    # Requests

    def ready(self) -> Ready:
        """What was built; a short run first, so that nothing is measured cold."""
        self._progress("warming up")
        run_uncached(self._model, [1] * self._options.chunk_tokens, self._options.chunk_tokens, 2, lambda tokens: None)
        return Ready(
            parameters=self._loaded.parameters,
            fingerprint=self._spec.fingerprint.hex(),
            groups=describe_groups(self._spec),
            layers=layer_words(self._spec),
            address="",
        )

    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of this run."""
        return make_prompts(self._options, self._cached.vocabulary)

    def uncached(self, prompt: Prompt) -> Uncached:
        """The model alone: the reference."""

        def progress(tokens: int) -> None:
            self._progress(f"{prompt.name}: computing without a cache", tokens / len(prompt))

        options = self._options
        return run_uncached(self._model, prompt.token_ids, options.chunk_tokens, options.decode_tokens, progress)

    def transfer_bytes(self, prompt: Prompt) -> int:
        """What the first prompt's transfer carries: its resume point, and the states of further checkpoints."""
        return cache_bytes(self._spec, len(prompt), 1 + len(self._checkpoints(prompt)))

    def hand_over(self, prompt: Prompt, address: str, pace_bytes_per_s: float, is_first: bool) -> Sent:
        """Prefill, with the cache leaving for the decode process while it is computed."""
        observer = self._begin(prompt, "computing and sending")
        handed = self._cached.hand_over(
            list(prompt.token_ids),
            address,
            checkpoints=self._checkpoints(prompt) if is_first else None,
            send_options={"transport": kvstore.TransportOptions(pace_bytes_per_s), "observer": observer},
        )
        self._progress(f"{prompt.name}: computed, sending the rest", 1.0)
        report = handed.wait(TRANSFER_DEADLINE_S)
        times, match = handed.prefilled.times, handed.prefilled.match
        assert match is not None, "with strict_store a failed match would have raised"
        return self._sent(
            match, handed.prefilled.checkpoints, report, times.started_s, times.computed_s, times.export_s
        )

    def store_and_forward(self, prompt: Prompt, salt: bytes, address: str, pace_bytes_per_s: float) -> Sent:
        """The control: the same prompt and rate, but nothing leaves before the last token is computed."""
        observer = self._begin(prompt, "computing, sending nothing yet")
        started_s = time.monotonic()
        tokens = self._store.prompt(prompt.token_ids, salt=salt)
        match = self._store.match(tokens)
        grid = kvstore.ChunkGrid.every(self._options.chunk_tokens, upto=len(prompt))
        lengths = (*self._checkpoints(prompt), len(prompt))
        cache = self._empty_cache()
        with self._store.write(tokens, resume_at=lengths, grid=grid) as writer:
            with LayerExporter(self._model, self._spec, writer, listener=self._layer_computed) as exporter:
                for start, end in grid.chunks():
                    with exporter.chunk(start, end):
                        logits = forward(self._model, prompt.token_ids[start:end], cache, start)
            computed_s = time.monotonic()
            self._progress(f"{prompt.name}: computed, sending everything", 1.0)
            transfer = writer.send(address, transport=kvstore.TransportOptions(pace_bytes_per_s), observer=observer)
            writer.commit(handover=kvstore.HandOver(int(logits.argmax()), logits.float().numpy().tobytes()))
        report = transfer.result(TRANSFER_DEADLINE_S)
        return self._sent(match, lengths, report, started_s, computed_s, exporter.seconds)

    # Parts

    def _checkpoints(self, prompt: Prompt) -> tuple[int, ...]:
        if not self._spec.state_groups:
            return ()
        return checkpoint_lengths(len(prompt), self._options.chunk_tokens)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _begin(self, prompt: Prompt, doing: str) -> _SendObserver:
        self._bars = []
        self._prompt_tokens = len(prompt)
        self._doing = f"{prompt.name}: {doing}"
        return _SendObserver(self._bars)

    def _layer_computed(self, event: LayerEvent) -> None:
        chunk = (event.start_tokens, event.end_tokens)
        self._bars.append(Bar("compute", event.layer, event.began_at_s, event.computed_at_s, event.size_bytes, chunk))
        if event.layer == self._last_layer:
            self._progress(self._doing, event.end_tokens / self._prompt_tokens)

    def _sent(
        self,
        match: Match,
        checkpoints: tuple[int, ...],
        report: TransferReport,
        started_s: float,
        computed_s: float,
        export_s: float,
    ) -> Sent:
        return Sent(
            matched=Matched(
                tokens=match.tokens,
                attention_tokens=match.missing.attention_tokens,
                other_tokens=tuple(candidate.tokens for candidate in match.candidates[1:]),
                reasons=match.missing.reasons,
            ),
            checkpoints=checkpoints,
            bytes_by_group=dict(report.bytes_by_group),
            started_s=started_s,
            computed_s=computed_s,
            committed_s=report.committed_s,
            export_s=export_s,
            bars=tuple(self._bars),
        )


class _SendObserver(TransferObserver):
    """Notes each layer's bytes as they leave."""

    def __init__(self, bars: list[Bar]) -> None:
        self._bars = bars

    def piece_sent(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self._bars.append(Bar("send", layer, start_s, end_s, size_bytes))


def dram_bytes(options: Options, spec: kvstore.ModelSpec) -> int:
    """Room for every prompt of a run, and to spare."""
    return (16 << 20) + DRAM_PROMPTS * cache_bytes(spec, options.prompt_tokens * 2, 4)
