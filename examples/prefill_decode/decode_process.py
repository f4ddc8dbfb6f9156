"""The decode process: takes prompts over that it has never computed, and decodes them."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

import kvstore
from kvstore.adapters.transformers import CachedModel, restore_cache
from kvstore.spec import ReuseRule
from kvstore.transfer import TransferObserver
from kvstore.units import format_bytes

from .model import describe_groups, layer_words, load_model
from .prefill_process import dram_bytes
from .trained_model import load_tokenizer
from .uncached import decode_greedily
from .values import Bar, Damaged, Decoded, Prompt, Ready, Resumed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection

    from kvstore import Lease, ModelSpec

    from .arguments import Options
    from .child import Report

HANDOVER_DEADLINE_S = 1700.0
PROGRESS_BYTES = 1 << 20


def serve_decode(connection: Connection, options: Options) -> None:
    """Main function of the process."""
    from .child import serve

    serve(connection, options, DecodeProcess)


class DecodeProcess:
    """The model, a listening store, and what the parent may ask for. Closed by leaving the `with` block."""

    def __init__(self, options: Options, progress: Report) -> None:
        progress("building the model")
        torch.set_num_threads(1)
        self._options = options
        self._progress = progress
        self._loaded = load_model(options)
        self._spec = self._loaded.spec
        self._tokenizer: Any = load_tokenizer() if options.is_trained else None
        self._store = kvstore.open(self._spec, dram=dram_bytes(options, self._spec))
        self._observer = _ReceiveObserver(progress)
        self._endpoint = self._store.listen("tcp://127.0.0.1:0", observer=self._observer)

    def __enter__(self) -> DecodeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    # Requests

    def ready(self) -> Ready:
        """What was built, and where it listens."""
        return Ready(
            parameters=self._loaded.parameters,
            fingerprint=self._spec.fingerprint.hex(),
            groups=describe_groups(self._spec),
            layers=layer_words(self._spec),
            address=self._endpoint.address,
        )

    def resume(self, prompt: Prompt, salt: bytes, with_damage: bool) -> Resumed:
        """Take a prompt over and decode it; if asked to, once more from a damaged copy."""
        self._observer.begin(prompt.name)
        self._progress(f"{prompt.name}: waiting for the hand-over")
        cached = CachedModel(
            self._loaded.model,
            self._store,
            chunk_tokens=self._options.chunk_tokens,
            salt=salt,
            strict_store=True,
            verify_reads=True,
        )
        with ExitStack() as stack:
            # The last states of a hand-over go with it; this lease keeps them for the damaged copy.
            lease = stack.enter_context(self._hold(prompt, salt)) if with_damage else None
            generated = cached.resume(
                list(prompt.token_ids), self._options.decode_tokens, deadline_s=HANDOVER_DEADLINE_S, keep_logits=True
            )
            assert generated.logits is not None, "they were asked for"
            decoded = Decoded(generated.tokens, generated.logits.numpy())
            damaged = None if lease is None else self._decode_damaged(lease, decoded)
        return Resumed(
            decoded=damaged.decoded if damaged is not None and self._options.sabotage else decoded,
            restore_s=generated.ttft_s,
            resumed_tokens=generated.resumed_tokens,
            damaged=damaged,
            text=self._text(decoded),
            bars=tuple(self._observer.bars),
        )

    def _hold(self, prompt: Prompt, salt: bytes) -> Lease:
        """Wait for a hand-over, without taking it."""
        # A match leaves at least one token to compute, so one more is asked for than is handed over.
        further = self._store.prompt([*prompt.token_ids, 0], salt=salt)
        return self._store.read(self._store.when_ready(further, len(prompt)).result(HANDOVER_DEADLINE_S))

    def _text(self, decoded: Decoded) -> str | None:
        """The answer: what was decoded before the model ended its turn."""
        if self._tokenizer is None:
            return None
        answer = list(takewhile(lambda token: token != self._tokenizer.eos_token_id, decoded.tokens))
        text: str = self._tokenizer.decode(answer)
        return text

    def _decode_damaged(self, lease: Lease, intact: Decoded) -> Damaged:
        """The same continuation from a copy with one state set to zero."""
        self._progress("decoding from a damaged copy")
        layer, name, what = _victim(self._spec)

        def fill(number: int, tensors: Mapping[str, torch.Tensor]) -> None:
            lease.layer(number).copy_to(**tensors)
            if number == layer:
                tensors[name].zero_()

        model = self._loaded.model
        cache = restore_cache(model.config, self._spec, lease.tokens, fill)
        first_logits = torch.from_numpy(intact.logits[0])
        decoded = decode_greedily(
            model, cache, intact.tokens[0], first_logits, lease.tokens, self._options.decode_tokens
        )
        return Damaged(what, decoded)


def _victim(spec: ModelSpec) -> tuple[int, str, str]:
    """Layer and tensor to damage: the last tensor of the first state; of a dense model the first keys."""
    group = next((group for group in spec.groups if group.rule is ReuseRule.STATE), spec.groups[0])
    tensor = group.tensors[-1] if group.rule is ReuseRule.STATE else group.tensors[0]
    return group.layers[0], tensor.name, f"{tensor.name} of layer {group.layers[0]} set to zero"


class _ReceiveObserver(TransferObserver):
    """Notes each layer's bytes as they arrive."""

    def __init__(self, progress: Report) -> None:
        self._progress = progress
        self.begin("")

    def begin(self, name: str) -> None:
        """A new prompt."""
        self._name = name
        self.bars: list[Bar] = []
        self._received_bytes = 0
        self._reported_bytes = 0

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self.bars.append(Bar("receive", layer, start_s, end_s, size_bytes))
        self._received_bytes += size_bytes
        if self._received_bytes - self._reported_bytes >= PROGRESS_BYTES:
            self._reported_bytes = self._received_bytes
            self._progress(f"{self._name}: received {format_bytes(self._received_bytes)}")
