"""`CachedModel` on a store with a tier on disk: what lies there only is reused, after a restart too, as if uncached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvstore  # noqa: E402
from kvstore.adapters.transformers import CachedModel, Decoder  # noqa: E402
from kvstore.placement.tiered import TieredPool  # noqa: E402
from kvstore.spec import ModelSpec  # noqa: E402
from kvstore.testing.resume import check_resume_equivalence  # noqa: E402
from tests.models.tiny import build_tiny  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.pool import Match
    from kvstore.store import Store

BLOCK_TOKENS, CHUNK_TOKENS, STEPS = 4, 8, 4
PROMPT_TOKENS = 45
RESUMED_TOKENS = 40
TEST_S = 60.0
FAMILIES = ["qwen3_5", "gemma3", "llama"]
"""With linear attention, with sliding windows, with neither."""


def spec_of(model: Any) -> ModelSpec:
    return ModelSpec.from_transformers(model.config, weights="test", block_tokens=BLOCK_TOKENS, dtype=model.dtype)


def prompt(seed: int) -> Any:
    return torch.randint(3, 128, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, store: Store, ids: Any) -> Any:
    cached = CachedModel(model, store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
    return cached.generate(ids, STEPS, keep_logits=True)


def uncached(model: Any, ids: Any) -> Any:
    decoder, cache = Decoder(model), transformers.DynamicCache(config=model.config)
    for start in range(0, len(ids), CHUNK_TOKENS):
        logits = decoder.run(ids[start : start + CHUNK_TOKENS], cache, start)
    rows = [logits]
    for step in range(STEPS - 1):
        rows.append(decoder.run(rows[-1].argmax().view(1), cache, len(ids) + step))
    return torch.stack(rows).float()


def loaded_bytes(store: Store) -> int:
    assert isinstance(store.pool, TieredPool)
    return store.pool.statistics().shelves[0].loaded_bytes


@pytest.mark.parametrize("through_attached", [False, True], ids=["owner", "attached"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_on_disk_is_reused_after_a_restart(name: str, through_attached: bool, tmp_path: Path) -> None:
    model, ids = build_tiny(name), prompt(1)
    where, socket = f"{tmp_path}/kv:256MiB", tmp_path / "pool.sock"
    with kvstore.open(spec_of(model), dram="64MiB", ssd=where) as store:
        cold = generate(model, store, ids)
        assert cold.resumed_tokens == 0
        store.flush(TEST_S)
    with kvstore.open(spec_of(model), dram="64MiB", ssd=where, socket=socket) as store:
        assert store.match(ids.tolist()).tier == "ssd"
        if through_attached:
            with kvstore.attach(socket) as attached:
                warm = generate(model, attached, ids)
        else:
            warm = generate(model, store, ids)
        assert warm.resumed_tokens == RESUMED_TOKENS
        assert loaded_bytes(store) > 0
        store.pool.check()
    assert torch.equal(warm.logits, uncached(model, ids))
    assert warm.tokens == cold.tokens
    # The comparison can fail: another prompt's logits are not these.
    assert not torch.equal(warm.logits, uncached(model, prompt(2)))


class FromDisk:
    """A store that holds in memory nothing of a prompt that is asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.loaded_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def prompt(self, *what: Any, **options: Any) -> kvstore.Prompt:
        """What was committed before is on disk when the kit drops records of this prompt, there too."""
        self._store.flush(TEST_S)
        return self._store.prompt(*what, **options)

    def match(self, what: Any, **options: Any) -> Match:
        path = (what if isinstance(what, kvstore.Prompt) else self._store.prompt(what)).path
        self._store.flush(TEST_S)
        assert isinstance(self._store.pool, TieredPool)
        if len(path):
            self._store.pool.evict_here(path.key(0))
        found = self._store.match(what, **options)
        assert found.tier in (None, "ssd")
        return found

    def __enter__(self) -> FromDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.loaded_bytes = loaded_bytes(self._store)
        self._store.close()


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_every_resume_from_disk_computes_the_same(name: str, tmp_path: Path) -> None:
    """With negative controls: each damage to what was loaded changes the logits."""
    model = build_tiny(name)
    stores: list[FromDisk] = []

    def make_store() -> Any:
        where = f"{tmp_path}/{len(stores)}:256MiB"
        stores.append(FromDisk(kvstore.open(spec_of(model), dram="64MiB", ssd=where)))
        return stores[-1]

    report = check_resume_equivalence(
        model, make_store, chunk_tokens=CHUNK_TOKENS, prompt_tokens=PROMPT_TOKENS, random_cases=1
    )
    assert report.controls
    assert sum(store.loaded_bytes > 0 for store in stores) >= len(report.cases) // 2
