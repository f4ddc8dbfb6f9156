"""Hooks that put a layer's cache into the store as soon as the layer has computed it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvstore.adapters.transformers.cache_io import attention_range, layer_plan, states_at
from kvstore.adapters.transformers.decoder import decoder_layers, find_cache
from kvstore.errors import KVStoreError, SpecError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import torch

    from kvstore.spec import ModelSpec


class LayerWriter(Protocol):
    """The part of a store's writer that an exporter uses."""

    @property
    def resume_at(self) -> tuple[int, ...]:
        """Lengths at which states are to be put."""

    def put(self, layer: int, *, tokens: slice, cost_s: float = 0.0, **tensors: Any) -> None:
        """Take attention tensors `[rows, tokens, *inner]` of a token range, and what computing them took."""

    def put_state(self, layer: int, *, at: int, cost_s: float = 0.0, **tensors: Any) -> None:
        """Take states `[rows, *inner]` and windows `[rows, valid, *inner]` at a length."""

    def abort(self, reason: str) -> None:
        """Give the write up; idempotent."""


@dataclass(frozen=True)
class LayerEvent:
    """A layer's part of one chunk went into the store.

    Attributes:
        layer: layer number.
        start_tokens, end_tokens: the chunk.
        began_at_s: when the layer was called, on the monotonic clock.
        computed_at_s: when it returned. A device may still be computing then.
        stored_at_s: when the store had taken its tensors.
        size_bytes: bytes of those tensors.
    """

    layer: int
    start_tokens: int
    end_tokens: int
    began_at_s: float
    computed_at_s: float
    stored_at_s: float
    size_bytes: int


class LayerExporter:
    """Puts each decoder layer's new keys and values, and its states at checkpoints, as the layer returns.

        with store.write(ids, resume_at=(1024,)) as writer, LayerExporter(model, spec, writer) as exporter:
            for start, end in chunks:
                with exporter.chunk(start, end):
                    model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            writer.commit()

    The tensors are taken before the hook returns, so the model may overwrite them. Hooks exist between
    `__enter__` and `__exit__` only. For the thread that runs the model.

    Args:
        model: the model; its layers call the cache `past_key_values` or `cache_params`.
        spec: the store's spec.
        writer: what takes the tensors.
        strict: whether an error of the store (`KVStoreError`) is raised out of the forward pass. If
            not, it aborts the writer, is kept in `error`, and the model computes on without export.
            Any other exception aborts the writer and is raised in either case.
        listener: called with every `LayerEvent`, in the computing thread.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        writer: LayerWriter,
        *,
        strict: bool = True,
        listener: Callable[[LayerEvent], None] | None = None,
    ) -> None:
        self._layers = decoder_layers(model)
        self._spec = spec
        self._writer = writer
        self._strict = strict
        self._listener = listener
        self._hooks: list[Any] = []
        self._chunk: tuple[int, int] | None = None
        self._exported: set[int] = set()
        self._began_s: dict[int, float] = {}
        self._state_cost_s = [0.0] * len(self._layers)
        self.error: KVStoreError | None = None
        """What stopped the export, if anything did."""
        self.seconds = 0.0
        """Time spent in the store so far."""

    def __enter__(self) -> LayerExporter:
        for number, layer in enumerate(self._layers):
            if layer_plan(self._spec, number).tensors:
                self._hooks.append(layer.register_forward_pre_hook(self._begin_hook(number)))
                self._hooks.append(layer.register_forward_hook(self._end_hook(number), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if error is not None:
            self._writer.abort(f"the forward pass failed: {error}")

    @contextmanager
    def chunk(self, start_tokens: int, end_tokens: int) -> Iterator[None]:
        """Around one forward pass over tokens [`start_tokens`, `end_tokens`).

        Raises:
            WriteError: a layer with a cache did not run, or ran twice.
        """
        if self._chunk is not None:
            raise WriteError(f"the chunk {self._chunk} is still being computed; chunks follow one another")
        self._chunk = (start_tokens, end_tokens)
        self._exported.clear()
        try:
            yield
            if self.error is None:
                self._check_complete()
        finally:
            self._chunk = None

    def _check_complete(self) -> None:
        missing = sorted(set(self._spec.layers) - self._exported)
        if missing:
            self._fail(
                WriteError(
                    f"layers {missing} of the spec did not run in chunk {self._chunk}; "
                    "the model's layers are not those of the spec"
                )
            )

    def _begin_hook(self, number: int) -> Callable[..., None]:
        def begin(module: torch.nn.Module, arguments: Any) -> None:
            self._began_s[number] = time.monotonic()

        return begin

    def _end_hook(self, number: int) -> Callable[..., None]:
        def export(module: torch.nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
            if self.error is not None:
                return
            computed_s = time.monotonic()
            try:
                size_bytes = self._export(number, named, computed_s - self._began_s[number])
            except KVStoreError as error:
                self._fail(error)
                return
            finally:
                self.seconds += time.monotonic() - computed_s
            if self._listener is not None and self._chunk is not None:
                began_s = self._began_s[number]
                self._listener(LayerEvent(number, *self._chunk, began_s, computed_s, time.monotonic(), size_bytes))

        return export

    def _export(self, number: int, named: dict[str, Any], cost_s: float) -> int:
        if self._chunk is None:
            raise WriteError("a layer ran outside of exporter.chunk(start, end), so its token range is unknown")
        if number in self._exported:
            raise WriteError(f"layer {number} ran twice in chunk {self._chunk}; one chunk is one forward pass")
        cache = find_cache(named)
        if cache is None:
            raise SpecError(f"layer {number} was called without a cache; pass one to the model, with use_cache=True")
        start, end = self._chunk
        size_bytes = 0
        plan = layer_plan(self._spec, number)
        # What a layer costs is what its records save; with both kinds of records each saves a part.
        share_s = cost_s / (bool(plan.attention) + bool(plan.window or plan.states))
        self._state_cost_s[number] += share_s
        attention = attention_range(self._spec, cache, number, start, end)
        if attention:
            self._writer.put(number, tokens=slice(start, end), cost_s=share_s, **attention)
            size_bytes += sum(tensor.nbytes for tensor in attention.values())
        if end in self._writer.resume_at:
            states = states_at(self._spec, cache, number, end)
            if states:
                self._writer.put_state(number, at=end, cost_s=self._state_cost_s[number], **states)
                self._state_cost_s[number] = 0.0
                size_bytes += sum(tensor.nbytes for tensor in states.values())
        self._exported.add(number)
        return size_bytes

    def _fail(self, error: KVStoreError) -> None:
        self.error = error
        self._writer.abort(f"the export failed: {error}")
        if self._strict:
            raise error
