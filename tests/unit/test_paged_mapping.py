"""The mapping layer between an engine's pages and the store, over tensors that lie as vLLM's do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import LeaseError, SpecError, WriteError
from kvstore.spec import Shard
from kvstore.store import open_store

torch = pytest.importorskip("torch")

from kvstore.adapters.paged import CheckpointPolicy, PagedMapping, spec_of  # noqa: E402
from kvstore.adapters.vllm.facts import KeyValueLayout, ModelFacts  # noqa: E402
from kvstore.adapters.vllm.groups import NULL_PAGE, engine_groups  # noqa: E402
from tests.paged_engine import (  # noqa: E402
    Engine,
    MambaSpec,
    check,
    fill,
    fill_loaded,
    first_needed,
    model_groups,
    model_splits,
    spec_of_layer,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.adapters.paged import EngineGroup
    from kvstore.store import Store

MODELS = ("dense", "window", "chunks", "latent", "hybrid", "mamba2", "uneven")
LAYOUTS = {"content": KeyValueLayout.CONTENT, "tokens first": KeyValueLayout.CONTENT, "cpu": KeyValueLayout.CPU}


class Worker:
    """One rank of an engine, and its mapping."""

    def __init__(
        self,
        model: str,
        page_tokens: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        pages: int = 40,
        layout: str = "content",
        kernel_tokens: int | None = None,
        seed: int = 0,
        mamba_groups: int = 4,
        block_tokens: int = 64,
    ) -> None:
        given = model_groups(model, page_tokens, ranks=ranks, mamba_groups=mamba_groups)
        names = [name for group in given for name in group.layer_names]
        facts = ModelFacts(
            ranks=ranks, kv_heads=2, mamba_groups=mamba_groups, layouts=dict.fromkeys(names, LAYOUTS[layout])
        )
        self.groups: tuple[EngineGroup, ...] = engine_groups(given, facts)
        self.spec = spec_of(self.groups, model=model, weights="seed 0", block_tokens=block_tokens)
        splits = model_splits(model, mamba_groups)
        self.engine = Engine(given, splits, rank, ranks, pages, layout=layout, kernel_tokens=kernel_tokens, seed=seed)
        self.mapping = PagedMapping(self.spec, self.groups, Shard(rank, ranks), null_page=NULL_PAGE)
        self.mapping.register(self.engine.tensors)

    def tables(self, tokens: int, *, seed: int = 1, upto: int | None = None) -> list[list[int]]:
        """Pages for a prompt, in no order; of windows those before the one that `upto` tokens need are none."""
        rng = np.random.default_rng(seed)
        free = iter((1 + rng.permutation(self.engine.pages - 1)).tolist())
        tables = []
        for group in self.engine.groups:
            kind = spec_of_layer(group, group.layer_names[0])
            columns = -(-tokens // kind.block_size)
            needed = 0 if upto is None else first_needed(kind, upto) // kind.block_size
            is_state = isinstance(kind, MambaSpec) and upto is not None
            kept = [(upto - 1) // kind.block_size] if is_state and upto is not None else range(needed, columns)
            tables.append([next(free) if column in kept else NULL_PAGE for column in range(columns)])
        return tables


def save_all(store: Store, worker: Worker, ids: Sequence[int], steps: Sequence[int], *, seed: int = 1) -> None:
    """Compute a prompt in steps that end at some lengths, and save each step as an adapter does."""
    tables = worker.tables(len(ids), seed=seed)
    start = 0
    for stop in steps:
        prompt = store.prompt(ids[:stop])
        has_states = bool(worker.spec.state_groups)
        fill(worker.engine, worker.spec, prompt, tables, start, stop, stop)
        with store.write(prompt, resume_at=[stop] if has_states else None, shard=worker.mapping.shard) as writer:
            worker.mapping.save(writer, tables, 0, stop, at=stop if has_states else None)
            writer.commit()
        start = stop


def load_all(
    store: Store, worker: Worker, ids: Sequence[int], n: int, *, start: int = 0, seed: int = 2
) -> list[list[int]]:
    """Load `[start, n)` and the states at `n`, and compare every byte of the engine's memory."""
    tables = worker.tables(n, seed=seed, upto=n)
    prompt = store.prompt(ids[:n])
    fill(worker.engine, worker.spec, prompt, tables, 0, start)
    before = worker.engine.copy_of_memory()
    with store.read(store.match([*ids[:n], 1], shard=worker.mapping.shard)) as lease:
        assert lease.tokens == n
        worker.mapping.load(lease, tables, start)
    check(worker.engine, worker.spec, prompt, tables, start, n)
    after = worker.engine.copy_of_memory()
    for memory, was in zip(worker.engine.memory, before, strict=True):
        memory.view(torch.uint8).numpy()[:] = was
    fill_loaded(worker.engine, worker.spec, prompt, tables, start, n)
    for wanted, found in zip(worker.engine.copy_of_memory(), after, strict=True):
        assert wanted.tobytes() == found.tobytes()
    return tables


@pytest.mark.parametrize(
    ("model", "layout"),
    # vLLM's attention for CPUs has keys as wide as values.
    [(model, layout) for model in MODELS for layout in LAYOUTS if (model, layout) != ("uneven", "cpu")],
)
@pytest.mark.parametrize("page_tokens", [128, 256, 16, 48])
def test_what_one_engine_saves_another_loads(model: str, layout: str, page_tokens: int) -> None:
    """Pages of other sizes, chunks that end at no block's end, and another engine with other pages."""
    ids = [number * 37 % 501 + 3 for number in range(300)]
    writer = Worker(model, page_tokens, layout=layout, pages=80)
    with open_store(writer.spec, dram="16MiB") as store:
        save_all(store, writer, ids, [130, 256, 300])
        for n in (256, 300):
            reader = Worker(model, {128: 48, 256: 64, 16: 256, 48: 128}[page_tokens], pages=80, seed=n)
            load_all(store, reader, ids, n)
        # The engine's own cache has the begin already.
        reader = Worker(model, page_tokens, layout=layout, pages=80, seed=5)
        load_all(store, reader, ids, 300, start=page_tokens * (256 // page_tokens // 2))


def test_pages_of_kernels_are_parts_of_the_tables() -> None:
    """VLLM's tables count blocks of 256 tokens where its kernels take blocks of 64."""
    ids = list(range(300))
    writer = Worker("dense", 256, kernel_tokens=64)
    with open_store(writer.spec, dram="16MiB") as store:
        save_all(store, writer, ids, [300])
        load_all(store, Worker("dense", 128, kernel_tokens=32, seed=3), ids, 300)
        load_all(store, Worker("dense", 128, seed=3), ids, 300)


@pytest.mark.parametrize(("model", "mamba_groups"), [*((model, 4) for model in MODELS), ("mamba2", 1)])
@pytest.mark.parametrize("writers", [2, 4])
def test_some_ranks_save_and_others_load(model: str, mamba_groups: int, writers: int) -> None:
    """States split by their own parts, heads are on several ranks where there are few: bit for bit."""
    ids = [number * 11 % 97 for number in range(150)]
    whole = Worker(model, 48, mamba_groups=mamba_groups)
    with open_store(whole.spec, dram="16MiB") as store:
        for rank in range(writers):
            worker = Worker(model, 128, rank=rank, ranks=writers, mamba_groups=mamba_groups, layout="tokens first")
            assert worker.spec == whole.spec
            save_all(store, worker, ids, [150])
        load_all(store, whole, ids, 150)
        for ranks in (2, 4):
            for rank in range(ranks):
                reader = Worker(model, 64, rank=rank, ranks=ranks, mamba_groups=mamba_groups, seed=rank)
                assert reader.spec.fingerprint == whole.spec.fingerprint
                load_all(store, reader, ids, 150)


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_the_pages_and_chunks(data: st.DataObject) -> None:
    """What is loaded is what was saved: exactly `[start, n)` and the states at n, and not a byte besides."""
    model = data.draw(st.sampled_from(MODELS))
    layouts = sorted(set(LAYOUTS) - ({"cpu"} if model == "uneven" else set()))
    sizes = st.integers(1, 40)
    block_tokens = data.draw(st.sampled_from([16, 24, 64]))
    ends = sorted(data.draw(st.sets(st.integers(1, 110), min_size=1, max_size=4)))
    ids = list(range(7, 7 + ends[-1]))
    kernel = data.draw(sizes)
    ratio = data.draw(st.integers(1, 3))
    may_split = model == "dense"
    writer = Worker(
        model,
        kernel * (ratio if may_split else 1),
        kernel_tokens=kernel if may_split else None,
        layout=data.draw(st.sampled_from(layouts)),
        pages=500,
        block_tokens=block_tokens,
    )
    with open_store(writer.spec, dram="16MiB") as store:
        save_all(store, writer, ids, ends)
        n = data.draw(st.sampled_from(ends))
        page_tokens = data.draw(sizes)
        reader = Worker(
            model,
            page_tokens,
            layout=data.draw(st.sampled_from(layouts)),
            pages=500,
            seed=data.draw(st.integers(1, 9)),
            block_tokens=block_tokens,
        )
        start = data.draw(st.integers(0, n // page_tokens)) * page_tokens
        tables = load_all(store, reader, ids, n, start=start)
        # Every page that a load may have changed is named: what a load that failed must be computed again for.
        named = [set(pages) for pages in reader.mapping.pages_filled(tables, start, n)]
        for group in reader.groups:
            kept = {page for page in tables[group.index] if page != NULL_PAGE}
            if group.is_state or not start:
                assert named[group.index] == kept
            else:
                assert named[group.index] == kept - set(tables[group.index][: start // page_tokens])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("page_tokens", [16, 48, 128])
def test_every_length_that_the_policy_chooses(model: str, page_tokens: int) -> None:
    """The store takes them, whatever the engine's pages are, and each of them can be gone on from."""
    ids = [number * 7 % 211 for number in range(300)]
    worker = Worker(model, page_tokens, pages=80)
    policy = CheckpointPolicy(
        page_tokens,
        has_states=worker.mapping.has_states,
        has_windows=bool(worker.mapping.window_tokens),
        block_tokens=worker.spec.block_tokens,
    )
    with open_store(worker.spec, dram="16MiB") as store:
        tables = worker.tables(300)
        found = []
        start = 0
        for stop in (150, 256, 300):
            fill(worker.engine, worker.spec, store.prompt(ids), tables, start, stop, stop)
            lengths = policy.lengths(start, stop, 300, (140, 192))
            start = stop
            if not lengths:
                continue
            found += lengths
            end = lengths[-1]
            with store.write(store.prompt(ids[:end]), resume_at=lengths) as writer:
                worker.mapping.save(writer, tables, 0, end, at=end if worker.spec.state_groups else None)
                for length in lengths[:-1]:
                    worker.mapping.save(writer, tables, end, end, at=length)
                writer.commit()
        assert found[-1] == 300
        for length in found:
            load_all(store, Worker(model, 64, pages=80, seed=length), ids, length)


# What must be noticed


def test_the_comparison_notices() -> None:
    """Zeroed and stale pages, pages in another order, the state of another length, the bytes of another layout."""
    ids = list(range(300))
    writer = Worker("hybrid", 128, layout="cpu")
    with open_store(writer.spec, dram="16MiB") as store:
        save_all(store, writer, ids, [130, 300])
        prompt = store.prompt(ids)
        for group, group_index in ((3, 3), (0, 0)):
            reader = Worker("hybrid", 128, layout="cpu", seed=3)
            tables = load_all(store, reader, ids, 300)
            name = reader.engine.groups[group].layer_names[0]
            reader.engine.tensors[name][next(page for page in tables[group_index] if page)].zero_()
            with pytest.raises(AssertionError):
                check(reader.engine, reader.spec, prompt, tables, 0, 300)
        reader = Worker("hybrid", 128, layout="cpu", seed=3)
        tables = reader.tables(300, upto=300)
        with store.read(store.match([*ids, 1])) as lease:
            reader.mapping.load(lease, tables)
            check(reader.engine, reader.spec, prompt, tables, 0, 300)
            swapped = [list(table) for table in tables]
            swapped[3][0], swapped[3][1] = swapped[3][1], swapped[3][0]
            with pytest.raises(AssertionError):
                check(reader.engine, reader.spec, prompt, swapped, 0, 300)
        with store.read(store.match([*ids[:130], 1])) as lease:
            reader.mapping.load(lease, [table[:2] for table in reader.tables(130, upto=130)])
            with pytest.raises(AssertionError):
                check(reader.engine, reader.spec, prompt, tables, 0, 300)
        # Pages of other sizes in a layout that is not the engine's: whole pages alone would come back right.
        wrong = Worker("dense", 128, layout="cpu")
        wrong.mapping = Worker("dense", 128, layout="content").mapping
        wrong.mapping.register(wrong.engine.tensors)
    with open_store(wrong.spec, dram="16MiB") as store:
        save_all(store, wrong, ids, [300])
        reader = Worker("dense", 64, layout="cpu")
        with pytest.raises(AssertionError):
            load_all(store, reader, ids, 300)


def test_ranks_that_are_taken_for_others_are_noticed() -> None:
    """The comparison over ranks can fail: rank 1's rows under the name of rank 0's."""
    ids = list(range(100))
    for model in ("hybrid", "mamba2"):
        whole = Worker(model, 64)
        with open_store(whole.spec, dram="16MiB") as store:
            for rank in range(2):
                worker = Worker(model, 64, rank=rank, ranks=2)
                worker.engine.rank = 1 - rank
                save_all(store, worker, ids, [100])
            with pytest.raises(AssertionError):
                load_all(store, whole, ids, 100)


def test_layers_one_by_one() -> None:
    """As a connector saves and loads while the forward pass runs."""
    ids = list(range(200))
    writer = Worker("window", 64)
    with open_store(writer.spec, dram="16MiB") as store:
        tables = writer.tables(200)
        prompt = store.prompt(ids)
        fill(writer.engine, writer.spec, prompt, tables, 0, 200)
        with store.write(prompt, resume_at=[200]) as out:
            for layer in range(4):
                writer.mapping.save(out, tables, 0, 200, at=200, layers=[layer])
            out.commit()
        reader = Worker("window", 32, seed=4)
        tables = reader.tables(200, upto=200)
        with store.read(store.match([*ids, 1]), layered=True) as lease:
            for layer in range(4):
                reader.mapping.load(lease, tables, layers=[layer])
        check(reader.engine, reader.spec, prompt, tables, 0, 200)


# Misuse


def test_pages_that_the_engine_gave_up_are_not_saved() -> None:
    """Nothing is put in the place of a page that is needed and is none."""
    ids = list(range(200))
    worker = Worker("window", 64)
    tables = worker.tables(200)
    with open_store(worker.spec, dram="16MiB") as store:
        prompt = store.prompt(ids)
        fill(worker.engine, worker.spec, prompt, tables, 0, 200)
        window, full = tables
        assert worker.mapping.can_save_at(tables, 200)
        assert worker.mapping.can_save_at([[0, 0, *window[2:]], full], 200)
        assert not worker.mapping.can_save_at([[0, 0, 0, window[3]], full], 200)
        with store.write(prompt, resume_at=[200]) as writer:
            with pytest.raises(WriteError, match="page 2 of engine group 0 is none"):
                worker.mapping.save(writer, [[0, 0, 0, window[3]], full], 0, 200, at=200)
            with pytest.raises(WriteError, match="page 0 of engine group 1 is none"):
                worker.mapping.save(writer, [window, [0, *full[1:]]], 0, 200)
            with pytest.raises(WriteError, match="has 3 pages"):
                worker.mapping.save(writer, [window, full[:3]], 0, 200)
            with pytest.raises(WriteError, match="there are 1 tables"):
                worker.mapping.save(writer, [window], 0, 200)
            with pytest.raises(SpecError, match="page 41 of group 'attention' is none of its 40"):
                worker.mapping.save(writer, [window, [41, *full[1:]]], 0, 200)
            # Nothing of this has been put.
            worker.mapping.save(writer, [[0, 0, *window[2:]], full], 0, 200, at=200)
            writer.commit()
        load_all(store, Worker("window", 48, seed=7), ids, 200)


def test_misuse_of_a_load() -> None:
    ids = list(range(150))
    worker = Worker("hybrid", 128)
    with open_store(worker.spec, dram="16MiB") as store:
        save_all(store, worker, ids, [150])
        reader = Worker("hybrid", 64, seed=3)
        tables = reader.tables(150, upto=150)
        before = reader.engine.copy_of_memory()
        with store.read(store.match([*ids, 1])) as lease:
            for wrong, start, message in (
                ([[0, 0, 0], *tables[1:]], 0, "no page 2, which holds the state after 150"),
                ([tables[0], tables[1], [], tables[3]], 0, "no page 2"),
                ([*tables[:3], [0, *tables[3][1:]]], 0, "page 0 of engine group 3 is none"),
                (tables, 151, "from token 151 on"),
            ):
                with pytest.raises(LeaseError, match=message):
                    reader.mapping.load(lease, wrong, start, layers=None if start else [0, 3, 2])
            with pytest.raises(SpecError, match="layer 9 is in no group"):
                reader.mapping.load(lease, tables, layers=[9])
            with pytest.raises(SpecError, match="no tensors are registered"):
                PagedMapping(worker.spec, worker.groups).load(lease, tables)
        assert [each.tobytes() for each in before] == [each.tobytes() for each in reader.engine.copy_of_memory()]


def test_groups_of_another_model_are_refused() -> None:
    dense, window, wide = Worker("dense", 64), Worker("window", 64), Worker("uneven", 64)
    with pytest.raises(SpecError, match="'window' by its form"):
        PagedMapping(dense.spec, window.groups)
    with pytest.raises(SpecError, match=r"other tensors|by its form"):
        PagedMapping(dense.spec, wide.groups)
    with pytest.raises(SpecError, match="registered no tensor of layer 'model"):
        dense.mapping.register({})
    with pytest.raises(SpecError, match="do not divide"):
        PagedMapping(dense.spec, Worker("dense", 64).groups).register(Worker("dense", 48).engine.tensors)


# The page


def test_the_example_of_the_page() -> None:
    """docs/extending.md, "An engine adapter", as it stands there: what lay in some pages lies in others."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("mapping.register(", "mapping.register(tensors := "), names)
    for tensor in names["tensors"].values():
        assert torch.equal(tensor[[11, 12, 13, 14, 15, 16]], tensor[[5, 9, 2, 7, 1, 3]])
        assert torch.equal(tensor[17, :4], tensor[8, :4])
        assert not torch.equal(tensor[17, 4:], tensor[8, 4:])
    assert names["lease"].tokens == 100
