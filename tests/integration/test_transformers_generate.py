"""`CachedModel`: prefix reuse and generation through a store, its limits, and what happens when the store fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.adapters.transformers import CachedModel, Decoder, LayerEvent, Sampling  # noqa: E402
from kvstore.adapters.transformers.plan import plan_prefill  # noqa: E402
from kvstore.errors import (  # noqa: E402
    DeadlineError,
    PoolFullError,
    SpecError,
    StoreClosedError,
    TokenError,
    UnsupportedModelError,
    WriteError,
)
from kvstore.spec import ModelSpec  # noqa: E402
from kvstore.store import open_store  # noqa: E402
from tests.models.tiny import build_tiny  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.store import Store

CHUNK_TOKENS = 16
BLOCK_TOKENS = 8
STEPS = 4
HYBRIDS = ["qwen3_5", "bamba", "falcon_h1", "lfm2", "kimi_linear"]
OTHERS = ["llama", "gemma3", "gpt_oss", "deepseek_v3", "mamba2"]


def spec_of(model: Any) -> ModelSpec:
    return ModelSpec.from_transformers(model.config, weights="test", block_tokens=BLOCK_TOKENS, dtype=model.dtype)


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return build_tiny("qwen3_5")


@pytest.fixture
def store(hybrid: Any) -> Iterator[Store]:
    with open_store(spec_of(hybrid), dram="64MiB") as opened:
        yield opened
        opened.pool.check()


def prompt(tokens: int, seed: int = 0) -> Any:
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed))


def uncached(model: Any, ids: Any, boundaries: list[int] | None = None) -> Any:
    """Logits of the first decoded tokens of a run without a store, cut at the same lengths."""
    ends = boundaries or [*range(CHUNK_TOKENS, len(ids), CHUNK_TOKENS), len(ids)]
    decoder, cache = Decoder(model), transformers.DynamicCache(config=model.config)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        logits = decoder.run(ids[start:end], cache, start)
    rows = [logits]
    for step in range(STEPS - 1):
        rows.append(decoder.run(rows[-1].argmax().view(1), cache, len(ids) + step))
    return torch.stack(rows).float()


@pytest.mark.parametrize("name", HYBRIDS + OTHERS)
def test_reuse_changes_nothing_but_the_work(name: str) -> None:
    model = build_tiny(name)
    first, second = prompt(70, seed=1), prompt(70, seed=2)
    second[:50] = first[:50]
    with open_store(spec_of(model), dram="64MiB") as store:
        cached = CachedModel(model, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
        cold = cached.generate(
            first, STEPS, keep_logits=True, checkpoints=(32, 48, 64) if store.spec.state_groups else None
        )
        warm = cached.generate(second, STEPS, keep_logits=True)
        store.pool.check()
    assert cold.resumed_tokens == 0
    assert torch.equal(cold.logits, uncached(model, first))
    assert warm.resumed_tokens == 48
    assert torch.equal(warm.logits, uncached(model, second))
    assert warm.prefilled is not None
    assert warm.prefilled.computed_tokens == 22


@pytest.mark.parametrize("name", HYBRIDS)
def test_decoding_in_a_restored_cache_leaves_the_store_alone(name: str) -> None:
    """Engines update states in place: what they restored must be theirs alone."""
    model = build_tiny(name)
    ids = prompt(70)
    with open_store(spec_of(model), dram="64MiB") as store:
        cached = CachedModel(model, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
        cached.prefill(ids)
        before = stored_bytes(store, ids)
        first = cached.generate(ids, 3 * STEPS, keep_logits=True)
        second = cached.generate(ids, 3 * STEPS, keep_logits=True)
        assert first.resumed_tokens == second.resumed_tokens == 64
        assert torch.equal(first.logits, second.logits)
        assert stored_bytes(store, ids) == before


def stored_bytes(store: Store, ids: Any) -> dict[tuple[int, str], bytes]:
    """Every tensor of the resume point at 64 tokens, its checksums found to hold."""
    with store.read(store.match(ids).at(64), verify=True) as lease:
        return {
            (layer.number, name): layer.read(name).tobytes() for layer in lease for name in layer.names
        }  # fmt: skip


def test_bfloat16_is_exact_too() -> None:
    model = build_tiny("qwen3_5", "bfloat16")
    ids = prompt(70)
    with open_store(spec_of(model), dram="64MiB") as store:
        cached = CachedModel(model, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
        cached.prefill(ids)
        warm = cached.generate(ids, STEPS, keep_logits=True)
    assert warm.resumed_tokens == 64
    assert torch.equal(warm.logits, uncached(model, ids))


def test_the_third_prompt_falls_back_to_the_last_checkpoint_it_shares(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    first = prompt(96, seed=1)
    cached.prefill(first, checkpoints=(32, 80))
    third = prompt(96, seed=3)
    third[:70] = first[:70]
    prefilled = cached.prefill(third)
    assert prefilled.resumed_tokens == 32
    assert prefilled.match is not None
    assert prefilled.match.missing.attention_tokens == 64
    assert prefilled.match.missing.reasons


def test_by_default_the_store_says_where_states_are_taken(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    prefilled = cached.prefill(prompt(100))
    assert prefilled.checkpoints[-1] == prefilled.stored_tokens == 96, "the last full chunk on the grid"
    assert cached.prefill(prompt(100)).resumed_tokens == 96


def test_other_chunks_do_not_match_under_the_strict_grid_and_do_otherwise(hybrid: Any, store: Store) -> None:
    ids = prompt(80)
    writer = CachedModel(hybrid, store, chunk_tokens=40, strict_store=True)
    writer.prefill(ids, checkpoints=(40,))
    strict = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    assert strict.prefill(ids).resumed_tokens == 0
    # The strict run has stored its own states; compare on a store that has the foreign ones only.
    with open_store(store.spec, dram="64MiB") as other:
        CachedModel(hybrid, other, chunk_tokens=40, strict_store=True).prefill(ids, checkpoints=(40,))
        relaxed = CachedModel(hybrid, other, chunk_tokens=CHUNK_TOKENS, strict_grid=False, strict_store=True)
        answer = relaxed.generate(ids, STEPS, keep_logits=True)
        assert answer.resumed_tokens == 40
        assert torch.equal(answer.logits, uncached(hybrid, ids, [40, 48, 64, 80]))


def test_without_the_strict_grid_a_turn_goes_on_from_the_end_of_the_last_one(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_grid=False, strict_store=True)
    first = prompt(45)
    cached.prefill(first)
    second = torch.cat([first, prompt(30, seed=5)])
    answer = cached.generate(second, STEPS, keep_logits=True)
    assert answer.resumed_tokens == 45, "a tail within a block is a resume point"
    assert torch.equal(answer.logits, uncached(hybrid, second, [16, 32, 45, 48, 64, 75]))
    third = torch.cat([second, prompt(10, seed=6)])
    assert cached.prefill(third).resumed_tokens == 75


def test_a_prompt_shorter_than_a_chunk_or_a_block_is_computed(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    for tokens in (1, 3, BLOCK_TOKENS, CHUNK_TOKENS - 1):
        ids = prompt(tokens)
        prefilled = cached.prefill(ids)
        assert (prefilled.resumed_tokens, prefilled.stored_tokens, prefilled.error) == (0, 0, None)
        assert torch.equal(prefilled.logits, uncached(hybrid, ids)[0])


def test_salts_and_adapters_share_nothing(hybrid: Any, store: Store) -> None:
    ids = prompt(64)
    CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, salt=b"a", strict_store=True).prefill(ids)
    for other in ({"salt": b"b"}, {"salt": b"a", "adapter": "lora"}, {}):
        assert CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, **other).prefill(ids).resumed_tokens == 0
    assert CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, salt=b"a").prefill(ids).resumed_tokens == 48


def test_sampling_draws_alike_with_and_without_reuse(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    sampling = Sampling(temperature=1.5, seed=11)
    cold = cached.generate(prompt(64), 12, sampling=sampling)
    warm = cached.generate(prompt(64), 12, sampling=sampling)
    assert warm.resumed_tokens == 48
    assert cold.tokens == warm.tokens
    assert (
        len({cold.tokens, *(cached.generate(prompt(64), 12, sampling=Sampling(1.5, s)).tokens for s in range(4))}) > 2
    )


def test_stop_ids_end_the_text(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    tokens = cached.generate(prompt(20), 6).tokens
    stopped = cached.generate(prompt(20), 6, sampling=Sampling(stop_ids={tokens[2]}))
    assert stopped.tokens == tokens[: tokens.index(tokens[2]) + 1]
    with pytest.raises(TokenError, match="at least 1"):
        cached.generate(prompt(20), 0)


def test_a_full_store_does_not_stop_generation(hybrid: Any, caplog: Any) -> None:
    ids = prompt(160)
    with open_store(spec_of(hybrid), dram="96KiB") as small:
        cached = CachedModel(hybrid, small, chunk_tokens=CHUNK_TOKENS)
        answer = cached.generate(ids, STEPS, keep_logits=True)
        assert torch.equal(answer.logits, uncached(hybrid, ids))
        assert answer.prefilled is not None
        assert isinstance(answer.prefilled.error, PoolFullError)
        assert answer.prefilled.stored_tokens == 0
        assert cached.statistics.store_errors == 1
        assert "going on without the store: WriteTooLargeError" in caplog.text
        small.pool.check()
        with pytest.raises(PoolFullError):
            CachedModel(hybrid, small, chunk_tokens=CHUNK_TOKENS, strict_store=True).generate(ids, STEPS)
        small.pool.check()


def test_a_closed_store_does_not_stop_generation(hybrid: Any) -> None:
    ids = prompt(40)
    store = open_store(spec_of(hybrid), dram="64MiB")
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS)
    store.close()
    answer = cached.generate(ids, STEPS, keep_logits=True)
    assert torch.equal(answer.logits, uncached(hybrid, ids))
    assert answer.prefilled is not None
    assert isinstance(answer.prefilled.error, StoreClosedError)
    assert answer.prefilled.match is None


def test_a_store_that_is_closed_while_computing_does_not_stop_generation(hybrid: Any) -> None:
    ids = prompt(64)
    with open_store(spec_of(hybrid), dram="64MiB") as store:

        def close(event: LayerEvent) -> None:
            if (event.layer, event.end_tokens) == (2, 32):
                store.close()

        cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, listener=close)
        answer = cached.generate(ids, STEPS, keep_logits=True)
        assert torch.equal(answer.logits, uncached(hybrid, ids))
        assert cached.statistics.store_errors == 1


def test_a_failed_forward_pass_leaves_nothing_behind(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    calls = []

    def fail(module: Any, arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    hook = hybrid.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached.prefill(prompt(64))
    hook.remove()
    statistics = store.statistics()
    assert (statistics.reserved_bytes, statistics.committed_bytes, statistics.quarantined_bytes) == (0, 0, 0)
    assert cached.prefill(prompt(64)).resumed_tokens == 0


def test_damaged_records_are_not_used(hybrid: Any, store: Store) -> None:
    ids = prompt(70)
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS, verify_reads=True, strict_store=True)
    cached.prefill(ids, checkpoints=(32, 64))
    with store.read(store.match(ids)) as lease:
        state = next(held for held in lease.records if held.name.group in store.spec.state_groups)
        state.memory[state.layout.piece_offsets[0]] ^= 1
    answer = cached.generate(ids, STEPS, keep_logits=True)
    assert answer.resumed_tokens == 32
    assert torch.equal(answer.logits, uncached(hybrid, ids))
    assert store.statistics().damaged_records == 1


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], "no token ids"),
        ([5, -1], "-1 is outside"),
        ([5, 128], "outside the model's vocabulary"),
        ([1 << 32], "outside"),
    ],
)
def test_bad_token_ids_are_refused_by_name(hybrid: Any, store: Store, ids: list[int], expected: str) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS)
    with pytest.raises(TokenError, match=expected):
        cached.prefill(ids)


def test_impossible_checkpoints_are_refused_by_name(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS)
    with pytest.raises(WriteError, match=r"at 20 tokens.*Possible here: 16, 32, 48, 50"):
        cached.prefill(prompt(50), checkpoints=(20,))
    cached.prefill(prompt(50), checkpoints=(32,))
    with pytest.raises(WriteError, match=r"at 40 tokens.*Possible here: 48, 50"):
        cached.prefill(prompt(50), checkpoints=(40,))
    # What is restored need not be stored again: the same call works cold and warm.
    assert cached.prefill(prompt(50), checkpoints=(16, 48)).checkpoints == (48,)


def test_a_store_of_another_model_is_refused(hybrid: Any, store: Store) -> None:
    with pytest.raises(SpecError, match="not that of this 'llama'"):
        CachedModel(build_tiny("llama"), store)
    with pytest.raises(SpecError, match="groups, element types or configuration"):
        CachedModel(build_tiny("qwen3_5", "bfloat16"), store)
    renamed = build_tiny("qwen3_5")
    renamed.config.rms_norm_eps = 1e-3
    with pytest.raises(SpecError, match="configuration differ"):
        CachedModel(renamed, store)
    with pytest.raises(UnsupportedModelError, match="training mode"):
        CachedModel(build_tiny("qwen3_5").train(), store)


def test_other_weights_find_nothing(hybrid: Any, store: Store) -> None:
    ids = prompt(64)
    CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS).prefill(ids)
    other = ModelSpec.from_transformers(hybrid.config, weights="other", block_tokens=BLOCK_TOKENS, dtype=hybrid.dtype)
    assert other.fingerprint != store.spec.fingerprint
    assert not store.pool.match(open_store(other, dram="1MiB").prompt(ids))


def test_a_resume_without_a_handover_ends_at_its_deadline(hybrid: Any, store: Store) -> None:
    cached = CachedModel(hybrid, store, chunk_tokens=CHUNK_TOKENS)
    with pytest.raises(DeadlineError):
        cached.resume(prompt(40), 2, deadline_s=0.05)


def test_chunks_end_on_the_grid_wherever_they_resume(hybrid: Any) -> None:
    spec = spec_of(hybrid)

    def chunks(resume: int, **changes: Any) -> Any:
        arguments = {
            "prompt_tokens": 50, "resume_tokens": resume, "chunk_tokens": 16, "strict_grid": True,
            "is_grid_known": True, "wanted": (), **changes,
        }  # fmt: skip
        return plan_prefill(spec, **arguments)

    assert chunks(0).chunks == ((0, 16), (16, 32), (32, 48), (48, 50))
    assert chunks(21, strict_grid=False, is_grid_known=False).chunks == ((21, 32), (32, 48), (48, 50))
    assert chunks(21, strict_grid=False, is_grid_known=False).grid is None
    assert chunks(48).chunks == ((48, 50),)
    assert chunks(0, wanted=(10, 31, 47, 50)).checkpoints == (16, 32, 48), "10 lies below the first boundary"
    assert chunks(0, wanted=(50,), strict_grid=False).checkpoints == (50,)
    assert chunks(0, wanted=(), is_handover=True).checkpoints == (50,)
    assert chunks(0, chunk_tokens=20, wanted=(50,)).checkpoints == (40,), "20 ends no block of 8"
    assert chunks(0, prompt_tokens=48, wanted=(48,)).checkpoints == (48,)
