"""Export and restore of `transformers` caches, without a store: what goes in comes out, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.adapters.transformers.cache_io import attention_range, layer_buffers, restore_cache, states_at  # noqa: E402
from kvstore.adapters.transformers.decoder import Decoder, decoder_layers  # noqa: E402
from kvstore.adapters.transformers.exporter import LayerEvent, LayerExporter  # noqa: E402
from kvstore.errors import (  # noqa: E402
    KVStoreError,
    PoolFullError,
    SpecError,
    UnavailableError,
    UnsupportedModelError,
    WriteError,
)
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec  # noqa: E402
from tests.models.tiny import TINY, build_tiny  # noqa: E402

PROMPT_TOKENS = 45
CHUNK_TOKENS = 8
STEPS = 3


@dataclass
class RecordingWriter:
    """Keeps copies of what an exporter puts."""

    resume_at: tuple[int, ...] = ()
    attention: dict[tuple[int, str], list[Any]] = field(default_factory=dict)
    states: dict[tuple[int, str, int], Any] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    def put(self, layer: int, *, tokens: slice, cost_s: float = 0.0, **tensors: Any) -> None:
        for name, tensor in tensors.items():
            pieces = self.attention.setdefault((layer, name), [])
            assert tokens.start == sum(piece.shape[1] for piece in pieces), "ranges must follow one another"
            assert tensor.shape[1] == tokens.stop - tokens.start
            pieces.append(tensor.clone())

    def put_state(self, layer: int, *, at: int, cost_s: float = 0.0, **tensors: Any) -> None:
        for name, tensor in tensors.items():
            assert (layer, name, at) not in self.states
            self.states[layer, name, at] = tensor.clone()

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)

    def fill(self, tokens: int) -> Any:
        def into(layer: int, tensors: Any) -> None:
            for name, tensor in tensors.items():
                state = self.states.get((layer, name, tokens))
                tensor.copy_(torch.cat(self.attention[layer, name], 1)[:, :tokens] if state is None else state)

        return into


class FullWriter(RecordingWriter):
    def put(self, layer: int, *, tokens: slice, cost_s: float = 0.0, **tensors: Any) -> None:
        raise PoolFullError("no room")

    def put_state(self, layer: int, *, at: int, cost_s: float = 0.0, **tensors: Any) -> None:
        raise PoolFullError("no room")


def spec_of(model: Any) -> ModelSpec:
    return ModelSpec.from_transformers(model.config, weights="test", block_tokens=8, dtype=model.dtype)


def prompt(tokens: int = PROMPT_TOKENS, seed: int = 0) -> Any:
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed))


def chunks(start: int, end: int) -> list[tuple[int, int]]:
    return [(a, min(end, a + CHUNK_TOKENS)) for a in range(start, end, CHUNK_TOKENS)]


def compute(model: Any, cache: Any, ids: Any, start: int, exporter: LayerExporter | None = None) -> Any:
    """Logits after each chunk and after each of a few decoded tokens, [n, vocabulary]."""
    decoder = Decoder(model)
    rows = []
    for a, b in chunks(start, len(ids)):
        if exporter is None:
            rows.append(decoder.run(ids[a:b], cache, a))
        else:
            with exporter.chunk(a, b):
                rows.append(decoder.run(ids[a:b], cache, a))
    for step in range(STEPS):
        if exporter is not None:
            break
        rows.append(decoder.run(rows[-1].argmax().view(1), cache, len(ids) + step))
    return torch.stack(rows)


def export(model: Any, ids: Any, resume_at: tuple[int, ...]) -> RecordingWriter:
    writer = RecordingWriter(resume_at)
    cache = transformers.DynamicCache(config=model.config)
    with LayerExporter(model, spec_of(model), writer) as exporter:
        compute(model, cache, ids, 0, exporter)
    assert not writer.aborted
    return writer


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_continues_bit_for_bit_from_what_the_hooks_took(name: str) -> None:
    model = build_tiny(name)
    ids = prompt()
    # Before, within and past the windows of 16 tokens; the prompt's end lies in the middle of a block.
    lengths = (8, 16, 40, PROMPT_TOKENS)
    writer = export(model, ids, lengths)
    uncached = compute(model, transformers.DynamicCache(config=model.config), ids, 0)
    for tokens in lengths:
        cache = restore_cache(model.config, spec_of(model), tokens, writer.fill(tokens))
        if tokens == PROMPT_TOKENS:
            first = uncached[len(chunks(0, tokens)) - 1].argmax().view(1)
            continued = Decoder(model).run(first, cache, tokens)[None]
        else:
            continued = compute(model, cache, ids, tokens)
        expected = uncached[len(chunks(0, tokens)) :][: len(continued)]
        assert torch.equal(continued, expected), f"{name} resumed at {tokens} differs"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_5", "falcon_h1"])
def test_bfloat16_models_continue_bit_for_bit(name: str) -> None:
    model = build_tiny(name, "bfloat16")
    ids = prompt()
    writer = export(model, ids, (24,))
    cache = restore_cache(model.config, spec_of(model), 24, writer.fill(24))
    uncached = compute(model, transformers.DynamicCache(config=model.config), ids, 0)
    assert torch.equal(compute(model, cache, ids, 24), uncached[3:])


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_a_window_knows_how_many_tokens_it_has_seen(name: str) -> None:
    model = build_tiny(name)
    ids = prompt()
    uncached = compute(model, transformers.DynamicCache(config=model.config), ids, 0)
    writer = export(model, ids, (24,))
    right = restore_cache(model.config, spec_of(model), 24, writer.fill(24))
    wrong = restore_cache(model.config, spec_of(model), 24, writer.fill(24))
    windowed: list[Any] = [layer for layer in wrong.layers if hasattr(layer, "cumulative_length")]
    assert {layer.cumulative_length for layer in windowed} == {24}
    for layer in windowed:
        layer.cumulative_length = layer.keys.shape[-2]
    # Left to itself, as in `generate`, the model derives the positions from it.
    decoder = Decoder(model, explicit_positions=False)
    assert torch.equal(decoder.run(ids[24:32], right, 24), uncached[3])
    assert not torch.equal(decoder.run(ids[24:32], wrong, 24), uncached[3])


def test_exported_attention_is_a_view_of_the_cache() -> None:
    model = build_tiny("llama")
    cache = transformers.DynamicCache(config=model.config)
    compute(model, cache, prompt(16), 0)
    tokens = cache.layers[0].get_seq_length()
    found = attention_range(spec_of(model), cache, 0, 8, tokens)
    assert found["keys"].data_ptr() == cache.layers[0].keys[0, :, 8:].data_ptr()
    assert found["keys"].shape == (2, tokens - 8, 16)


def test_a_restored_cache_works_with_generate() -> None:
    model = build_tiny("qwen3_5")
    ids = prompt()
    cache = restore_cache(model.config, spec_of(model), 24, export(model, ids, (24,)).fill(24))
    out = model.generate(ids.view(1, -1), past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, PROMPT_TOKENS + 4)


def test_a_batch_is_refused_by_name() -> None:
    model = build_tiny("qwen3_5")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(16).view(2, 8), past_key_values=cache, use_cache=True)
    with pytest.raises(WriteError, match="batch of 2"):
        states_at(spec_of(model), cache, 0, 8)
    with pytest.raises(WriteError, match="batch of 2"):
        attention_range(spec_of(model), cache, 3, 0, 8)


def test_an_unknown_cache_layer_is_an_error() -> None:
    own_layer = type("OwnLayer", (transformers.cache_utils.DynamicLayer,), {})
    model = build_tiny("llama")
    cache = transformers.DynamicCache(config=model.config)
    cache.layers[1] = own_layer()
    compute(model, cache, prompt(8), 0)
    with pytest.raises(UnsupportedModelError, match=r"cache layer 1 is a .*OwnLayer"):
        attention_range(spec_of(model), cache, 1, 0, 8)


def test_a_static_cache_is_an_error() -> None:
    model = build_tiny("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    compute(model, cache, prompt(8), 0)
    with pytest.raises(UnsupportedModelError, match="StaticLayer"):
        attention_range(spec_of(model), cache, 0, 0, 8)


def test_a_second_state_that_the_spec_does_not_name_is_an_error() -> None:
    model = build_tiny("qwen3_5")
    cache = transformers.DynamicCache(config=model.config)
    cache.layers[0] = transformers.cache_utils.LinearAttentionLayer(number_of_states=2)
    compute(model, cache, prompt(8), 0)
    cache.layers[0].update_conv_state(torch.zeros(1, 4, 4), state_idx=1)
    with pytest.raises(UnsupportedModelError, match="has conv_1 beyond it"):
        states_at(spec_of(model), cache, 0, 8)


def test_a_spec_that_names_less_or_more_is_an_error() -> None:
    model = build_tiny("qwen3_5")
    spec = spec_of(model)
    cache = transformers.DynamicCache(config=model.config)
    compute(model, cache, prompt(8), 0)
    state = next(group for group in spec.groups if group.rule is ReuseRule.STATE)
    others = tuple(group for group in spec.groups if group is not state)
    lossy = replace(spec, groups=(*others, replace(state, tensors=state.tensors[:1])))
    with pytest.raises(UnsupportedModelError, match="has recurrent beyond it"):
        states_at(lossy, cache, 0, 8)
    dense = build_tiny("llama")
    with pytest.raises(UnsupportedModelError, match="names layer 3"):
        restore_cache(dense.config, spec, 8, lambda layer, tensors: None)


def test_a_window_of_another_size_is_an_error() -> None:
    model = build_tiny("mistral")
    ids = prompt()
    spec = spec_of(model)
    window = replace(spec.groups[0], window_tokens=7)
    with pytest.raises(WriteError, match="window differs"):
        restore_cache(model.config, replace(spec, groups=(window,)), 24, lambda layer, tensors: None)
    with pytest.raises(UnsupportedModelError, match="windowed in the model only"):
        restore_cache(model.config, spec_of(build_tiny("llama")), 24, export(model, ids, (24,)).fill(24))


def test_indexer_keys_travel_with_keys_and_values() -> None:
    heads = (Segment("heads", 2, 1),)
    one = (Segment("indexer", 1, 1, replicated=True),)
    group = CacheGroup(
        "attention",
        ReuseRule.ATTENTION,
        (0,),
        (
            TensorSpec("keys", DType.FLOAT32, heads, (4,), has_tokens=True),
            TensorSpec("values", DType.FLOAT32, heads, (4,), has_tokens=True),
            TensorSpec("indexer_keys", DType.FLOAT32, one, (3,), has_tokens=True),
        ),
    )
    spec = ModelSpec("indexed", "test", 8, (group,))
    config = transformers.LlamaConfig(num_hidden_layers=1, layer_types=["full_attention"])
    config.layer_types = ["indexed_attention"]
    cache = transformers.DynamicCache(config=config)
    layer = cache.layers[0]
    assert type(layer) is transformers.cache_utils.DynamicIndexedLayer
    layer.update(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
    layer.update_indexer(torch.randn(1, 6, 3))
    taken = attention_range(spec, cache, 0, 0, 6)
    assert taken["indexer_keys"].shape == (1, 6, 3)

    def fill(layer: int, tensors: Any) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(taken[name])

    restored = restore_cache(config, spec, 6, fill)
    for name in ("keys", "values", "indexer_keys"):
        assert torch.equal(getattr(restored.layers[0], name), getattr(layer, name))
    layer.indexer_position_ids = torch.zeros(1, 1, 6)
    with pytest.raises(UnsupportedModelError, match="indexer positions"):
        attention_range(spec, cache, 0, 0, 6)


def test_events_name_each_layer_and_chunk_in_the_order_of_computing() -> None:
    model = build_tiny("qwen3_5")
    events: list[LayerEvent] = []
    writer = RecordingWriter((16,))
    with LayerExporter(model, spec_of(model), writer, listener=events.append) as exporter:
        compute(model, transformers.DynamicCache(config=model.config), prompt(20), 0, exporter)
    assert [(e.layer, e.start_tokens, e.end_tokens) for e in events] == [
        (layer, start, end) for start, end in chunks(0, 20) for layer in range(4)
    ]
    assert all(a.began_at_s <= a.computed_at_s <= a.stored_at_s <= b.began_at_s for a, b in pairwise(events))
    states = {event.end_tokens for event in events if event.layer == 0 and event.size_bytes}
    assert states == {16}, "the states of a linear layer go out at checkpoints only"


def hooks_of(model: Any) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in decoder_layers(model))


def test_a_failed_forward_pass_removes_the_hooks_and_aborts_the_writer() -> None:
    model = build_tiny("llama")
    writer = RecordingWriter()
    hooks_within = []

    def run() -> None:
        with LayerExporter(model, spec_of(model), writer) as exporter, exporter.chunk(0, 8):
            hooks_within.append(hooks_of(model))
            raise RuntimeError("the engine failed")

    with pytest.raises(RuntimeError, match="engine"):
        run()
    assert hooks_within == [4]
    assert hooks_of(model) == 0
    assert writer.aborted == ["the forward pass failed: the engine failed"]


def test_a_full_store_is_raised_when_strict_and_kept_otherwise() -> None:
    model = build_tiny("qwen3_5")
    ids = prompt()
    strict = FullWriter((8,))
    with pytest.raises(PoolFullError), LayerExporter(model, spec_of(model), strict) as exporter:
        compute(model, transformers.DynamicCache(config=model.config), ids, 0, exporter)
    assert strict.aborted
    assert hooks_of(model) == 0

    lenient = FullWriter((8,))
    events: list[LayerEvent] = []
    with LayerExporter(model, spec_of(model), lenient, strict=False, listener=events.append) as exporter:
        rows = compute(model, transformers.DynamicCache(config=model.config), ids, 0, exporter)
    assert isinstance(exporter.error, PoolFullError)
    assert lenient.aborted == ["the export failed: no room"]
    assert events == []
    uncached = compute(model, transformers.DynamicCache(config=model.config), ids, 0)
    assert torch.equal(rows, uncached[: len(rows)]), "the model must compute on as if there were no store"


def test_an_error_that_is_not_the_stores_is_raised_also_when_lenient() -> None:
    model = build_tiny("llama")

    class BrokenWriter(RecordingWriter):
        def put(self, layer: int, *, tokens: slice, cost_s: float = 0.0, **tensors: Any) -> None:
            raise ZeroDivisionError

    writer = BrokenWriter()
    with pytest.raises(ZeroDivisionError), LayerExporter(model, spec_of(model), writer, strict=False) as exporter:
        compute(model, transformers.DynamicCache(config=model.config), prompt(), 0, exporter)
    assert writer.aborted


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 16, "hold 8 tokens, expected 16"), (8, 8, "hold 8 tokens, expected 8 with the chunk that began at 8")],
)
def test_a_chunk_that_is_not_what_the_model_computes_is_an_error(start: int, end: int, expected: str) -> None:
    model = build_tiny("llama")
    cache = transformers.DynamicCache(config=model.config)
    with (
        pytest.raises(WriteError, match=expected),
        LayerExporter(model, spec_of(model), RecordingWriter()) as exporter,
        exporter.chunk(start, end),
    ):
        Decoder(model).run(prompt(8), cache, 0)


def test_a_forward_pass_outside_of_a_chunk_is_an_error() -> None:
    model = build_tiny("llama")
    with (
        pytest.raises(WriteError, match=r"outside of exporter\.chunk"),
        LayerExporter(model, spec_of(model), RecordingWriter()),
    ):
        Decoder(model).run(prompt(8), transformers.DynamicCache(config=model.config), 0)


def test_a_forward_pass_without_a_cache_is_an_error() -> None:
    model = build_tiny("llama")
    with (
        pytest.raises(SpecError, match="without a cache"),
        LayerExporter(model, spec_of(model), RecordingWriter()) as exporter,
        exporter.chunk(0, 8),
    ):
        model(input_ids=prompt(8).view(1, -1), use_cache=False)


def test_a_chunk_without_a_forward_pass_is_an_error() -> None:
    model = build_tiny("llama")
    with (
        pytest.raises(KVStoreError, match=r"layers \[0, 1\] of the spec did not run"),
        LayerExporter(model, spec_of(model), RecordingWriter()) as exporter,
        exporter.chunk(0, 8),
    ):
        pass


def test_a_training_model_is_refused() -> None:
    model = build_tiny("llama").train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        Decoder(model)


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    model = build_tiny("llama")
    model.model.twins = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers, model\.twins"):
        decoder_layers(model)
    del model.model.twins
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="of its 5 layers"):
        decoder_layers(model)


def test_buffers_have_the_shapes_of_the_spec() -> None:
    model = build_tiny("gemma3")
    spec = spec_of(model)
    windowed = next(group for group in spec.groups if group.window_tokens).layers[0]
    full = next(group for group in spec.groups if group.rule is ReuseRule.ATTENTION).layers[0]
    assert layer_buffers(spec, windowed, 10)["keys"].shape == (2, 10, 16)
    assert layer_buffers(spec, windowed, 100)["keys"].shape == (2, 15, 16)
    assert layer_buffers(spec, full, 100)["values"].shape == (2, 100, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here")
def test_a_cache_on_a_device_is_staged_through_the_host() -> None:
    model = build_tiny("qwen3_5").to("cuda")
    ids = prompt()
    writer = export(model, ids, (24,))
    cache = restore_cache(model.config, spec_of(model), 24, writer.fill(24), device="cuda")
    uncached = compute(model, transformers.DynamicCache(config=model.config), ids, 0)
    assert torch.equal(compute(model, cache, ids, 24), uncached[3:])


@pytest.mark.parametrize("damage", ["absent", "old"])
def test_an_unfit_installation_is_named(damage: str, monkeypatch: Any) -> None:
    import importlib
    import sys

    from kvstore.adapters.transformers import requirements

    if damage == "absent":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.delattr(transformers.cache_utils, "DummyLayer")
    with pytest.raises(UnavailableError, match=r"install kvstore\[transformers\]"):
        importlib.reload(requirements)
