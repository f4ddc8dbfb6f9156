"""Resume equivalence over every tiny family, and the kit's own ability to fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvstore.spec import ModelSpec  # noqa: E402
from kvstore.store import open_store  # noqa: E402
from kvstore.testing.resume import Drop, check_resume_case, check_resume_equivalence  # noqa: E402
from tests.models.tiny import TINY, build_tiny  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.store import Store

BLOCK_TOKENS = 4
CHUNK_TOKENS = 8
PROMPT_TOKENS = 45
BOUNDARIES = tuple(range(CHUNK_TOKENS, PROMPT_TOKENS, CHUNK_TOKENS))


def maker(model: Any) -> Callable[[], Store]:
    spec = ModelSpec.from_transformers(model.config, weights="test", block_tokens=BLOCK_TOKENS, dtype=model.dtype)
    return lambda: open_store(spec, dram="64MiB")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: build_tiny(name) for name in ("qwen3_5", "gemma3", "falcon_h1", "llama")}


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_resumes_as_if_nothing_had_been_stored(name: str) -> None:
    model = build_tiny(name)
    report = check_resume_equivalence(
        model, maker(model), chunk_tokens=CHUNK_TOKENS, prompt_tokens=PROMPT_TOKENS, random_cases=1, seed=len(name)
    )
    print(report)


drops = st.lists(
    st.builds(Drop, st.sampled_from(range(BLOCK_TOKENS, PROMPT_TOKENS, BLOCK_TOKENS)), st.booleans()), max_size=4
)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shared=st.integers(0, PROMPT_TOKENS - 1),
    checkpoints=st.sets(st.sampled_from(BOUNDARIES), min_size=1),
    removed=drops,
)
@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_any_split_and_any_kept_records(
    name: str, shared: int, checkpoints: set[int], removed: list[Drop], models: dict[str, Any]
) -> None:
    model = models[name]
    check_resume_case(
        model,
        maker(model),
        chunk_tokens=CHUNK_TOKENS,
        prompt_tokens=PROMPT_TOKENS,
        shared_tokens=shared,
        checkpoints=sorted(checkpoints),
        drops=removed,
    )


class Meddler:
    """A store that gives back something else than it was given, as a faulty one would."""

    def __init__(self, store: Store, damage: Callable[[int, dict[str, Any]], None]) -> None:
        self._store = store
        self._damage = damage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __enter__(self) -> Meddler:
        return self

    def __exit__(self, *error: object) -> None:
        self._store.close()

    def read(self, match: Any, **options: Any) -> Any:
        return MeddledLease(self._store.read(match, **options), self._damage)


class MeddledLease:
    def __init__(self, lease: Any, damage: Callable[[int, dict[str, Any]], None]) -> None:
        self._lease = lease
        self._damage = damage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lease, name)

    def __enter__(self) -> MeddledLease:
        return self

    def __exit__(self, *error: object) -> None:
        self._lease.release()

    def layer(self, number: int) -> Any:
        view, damage = self._lease.layer(number), self._damage

        class MeddledLayer:
            def copy_to(self, **tensors: Any) -> None:
                view.copy_to(**tensors)
                damage(number, tensors)

        return MeddledLayer()


def flip_one_bit(layer: int, tensors: dict[str, Any]) -> None:
    if layer == 1 and "recurrent" in tensors:
        tensors["recurrent"].view(torch.int32).view(-1)[0] ^= 1 << 20


def test_the_kit_notices_a_store_that_changes_a_bit(models: dict[str, Any]) -> None:
    model = models["falcon_h1"]
    honest = maker(model)
    with pytest.raises(AssertionError, match="the logits of decoded token 0 differ"):
        check_resume_equivalence(
            model, lambda: Meddler(honest(), flip_one_bit), chunk_tokens=CHUNK_TOKENS, random_cases=0
        )


def test_the_kit_notices_a_store_that_finds_too_little_or_too_much(models: dict[str, Any]) -> None:
    model = models["falcon_h1"]
    arguments = {"chunk_tokens": CHUNK_TOKENS, "prompt_tokens": PROMPT_TOKENS, "checkpoints": BOUNDARIES}

    class Deaf(Meddler):
        def match(self, prompt: Any, **options: Any) -> Any:
            return self._store.match(self._store.prompt(prompt.token_ids[:8]), **options)

    with pytest.raises(AssertionError, match=r"resumed at 0, which is not the deepest that is left; expected 40"):
        check_resume_case(
            model, lambda: Deaf(maker(model)(), lambda layer, tensors: None), shared_tokens=44, drops=(), **arguments
        )

    class Forgetless(Meddler):
        class pool:  # noqa: N801
            @staticmethod
            def evict(key: bytes, *, states_only: bool = False) -> int:
                return 0

            @staticmethod
            def check() -> None:
                return

    with pytest.raises(AssertionError, match=r"resumed at 40, which is deeper than anything that is left; expected 32"):
        check_resume_case(
            model,
            lambda: Forgetless(maker(model)(), lambda layer, tensors: None),
            shared_tokens=44,
            drops=(Drop(40, states_only=True),),
            **arguments,
        )


def test_the_kit_refuses_a_model_in_which_damage_does_not_show(models: dict[str, Any]) -> None:
    model = build_tiny("falcon_h1")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mamba.out_proj" in name:
                parameter.zero_()
    with pytest.raises(AssertionError, match=r"unnoticed at 40 tokens: .*recurrent of layer 0 zeroed.* sharpen"):
        check_resume_equivalence(
            model, maker(model), chunk_tokens=CHUNK_TOKENS, prompt_tokens=PROMPT_TOKENS, random_cases=0
        )


def test_the_report_names_cases_and_controls(models: dict[str, Any]) -> None:
    model = models["gemma3"]
    report = check_resume_equivalence(
        model, maker(model), chunk_tokens=CHUNK_TOKENS, prompt_tokens=PROMPT_TOKENS, random_cases=0
    )
    text = str(report)
    assert "equal: shares 44, states at 8, 16, 24, 32, 40, dropped nothing: resumed at 40" in text
    assert "dropped states at 40: resumed at 32" in text
    assert "noticed: one block of keys of layer 5 zeroed at 40 tokens changed the logits by up to" in text
    assert "noticed: a window that claims 15 tokens at 40 tokens" in text
    assert "noticed: keys and values of layers 0 and 4 swapped" in text


def test_bad_arguments_are_named(models: dict[str, Any]) -> None:
    model = models["llama"]
    with pytest.raises(ValueError, match="no multiple of the spec's block_tokens=4"):
        check_resume_equivalence(model, maker(model), chunk_tokens=6)
    with pytest.raises(ValueError, match="no chunk of 64 to resume after"):
        check_resume_equivalence(model, maker(model), chunk_tokens=64, prompt_tokens=40)
