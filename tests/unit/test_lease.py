"""Leases: what is read is what was written, for as long as somebody looks at it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from kvstore.errors import LeaseError, LeaseGoneError, SpecError
from kvstore.spec import Shard
from kvstore.store import Lease, Store, open_store
from kvstore.testing.specs import check_lease, dense, hybrid, put_all, spans, token_values

B = 16
IDS = [(13 * number) % 1000 for number in range(40)]


@pytest.fixture
def store():  # type: ignore[no-untyped-def]
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, IDS, (32, 40))
        yield store
        store.pool.check()


def write(store: Store, ids: list[int], resume_at: tuple[int, ...] | None = None) -> None:
    with store.write(ids, resume_at=resume_at) as writer:
        put_all(writer)
        writer.commit()


def press(store: Store) -> None:
    """Overwrite everything that may be reused."""
    for seed in range(1000, 1400, 4):
        ids = [seed + number // 10 for number in range(40)]
        with store.write(ids) as writer:
            for record in writer.transaction.records:
                record.memory[:] = b"\xee" * len(record.memory)
            put_all(writer)
            writer.commit()
    assert store.statistics().evicted_records > 0


def test_layers_come_in_the_models_order(store: Store) -> None:
    with store.read(store.match([*IDS, 1])) as lease:
        assert [layer.number for layer in lease] == [0, 1, 2, 3, 4]
        assert [layer.names for layer in lease][:2] == [("conv", "recurrent"), ("keys", "values")]
        assert lease.layer(1).shape("keys") == (2, 40, 4)
        assert lease.layer(4).shape("window_keys") == (2, 7, 4)
        assert lease.size_bytes == sum(record.layout.record_bytes for record in lease.records)
        with pytest.raises(SpecError, match="no cache"):
            lease.layer(9)
        with pytest.raises(SpecError, match="keys, values"):
            lease.layer(1).read("conv")


def test_states_are_copies(store: Store) -> None:
    """Engines update them in place."""
    with store.read(store.match([*IDS, 1])) as lease:
        for layer, name in ((0, "conv"), (0, "recurrent"), (4, "window_keys")):
            copy = lease.layer(layer).read(name)
            copy[:] = 0
            assert lease.layer(layer).read(name).any()
            with pytest.raises(LeaseError, match="read"):
                lease.layer(layer).blocks(name)
        assert lease.verify() == []


def test_views_are_the_records_own_memory_and_read_only(store: Store) -> None:
    prompt = store.prompt(IDS)
    with store.read(store.match([*IDS, 1])) as lease:
        views = lease.layer(3).blocks("values")
        assert [view.shape for view in views] == [(2, 16, 4), (2, 16, 4), (2, 8, 4)]
        joined = np.concatenate(views, axis=1)
        assert joined.tobytes() == token_values(store.spec, prompt, 3, "values", 0, 40).tobytes()
        for view in views:
            with pytest.raises(ValueError, match="read-only"):
                view[:] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                view.flags.writeable = True


def test_views_of_a_share(store: Store) -> None:
    prompt = store.prompt(IDS)
    for index in range(2):
        shard = Shard(index, 2)
        with store.read(store.match([*IDS, 1], shard=shard)) as lease:
            joined = np.concatenate(lease.layer(1).blocks("keys"), axis=1)
            assert joined.tobytes() == token_values(store.spec, prompt, 1, "keys", 0, 40, shard).tobytes()


def test_views_of_what_several_workers_wrote() -> None:
    with open_store(hybrid(B), dram="4MiB") as store:
        for index in range(2):
            with store.write(IDS, shard=Shard(index, 2)) as writer:
                put_all(writer)
                writer.commit()
        with store.read(store.match([*IDS, 1])) as lease:
            check_lease(lease, store.prompt(IDS))
            with pytest.raises(LeaseError, match="several records"):
                lease.layer(1).blocks("keys")


@pytest.mark.parametrize(
    "derive",
    [
        lambda view: view,
        lambda view: view[:1],
        lambda view: view[:, 3:].transpose(1, 0, 2),
        np.asarray,
        lambda view: view.view(np.uint32),
        lambda view: np.asarray(view[0]).reshape(-1)[::2],
        memoryview,
        lambda view: np.frombuffer(memoryview(view[0, 0]), np.float32),
    ],
    ids=["view", "slice", "transpose", "asarray", "bits", "reshape", "memoryview", "buffer"],
)
def test_a_view_keeps_its_lease(derive: Any) -> None:
    """By reference, in whatever way it was made from the view that was given out."""
    with open_store(hybrid(B), dram=300 << 10) as store:
        write(store, IDS)
        lease = store.read(store.match([*IDS, 1]))
        view = derive(lease.layer(1).blocks("keys")[1])
        kept = bytes(np.asarray(view).tobytes())
        del lease
        gc.collect()
        press(store)
        assert np.asarray(view).tobytes() == kept, "the memory under a view was reused"
        path = store.prompt(IDS).path
        assert store.pool.evict(path.key(0)) == 0
        del view
        gc.collect()
        assert store.pool.evict(path.key(0)) > 0
        store.pool.check()


def test_torch_views_keep_their_lease() -> None:
    torch = pytest.importorskip("torch")
    with open_store(hybrid(B), dram=300 << 10) as store:
        write(store, IDS)
        lease = store.read(store.match([*IDS, 1]))
        array = lease.layer(1).blocks("keys")[1]
        with pytest.warns(UserWarning, match="not writable"):
            view = torch.from_numpy(array)[:, 2:]
        kept = view.clone()
        del lease, array
        gc.collect()
        press(store)
        assert torch.equal(view.view(torch.int32), kept.view(torch.int32))


def test_arrow_views_keep_their_lease() -> None:
    with open_store(hybrid(B), dram=300 << 10) as store:
        write(store, IDS)
        lease = store.read(store.match([*IDS, 1]))
        held = lease.records[0]
        batch, array = lease.record(held).to_arrow(), lease.record(held).tensor(1, "keys")
        kept = [column.to_pylist() for column in (batch.column("crc32c"),)], array.tobytes()
        del lease
        gc.collect()
        press(store)
        assert ([batch.column("crc32c").to_pylist()], array.tobytes()) == kept
        del batch, array
        gc.collect()
        assert store.pool.evict(store.prompt(IDS).path.key(0)) > 0


def test_records_of_a_lease_are_read_only(store: Store) -> None:
    with store.read(store.match([*IDS, 1])) as lease:
        for held in lease.records:
            assert lease.record(held).memory.readonly


def test_a_dropped_lease_is_released(store: Store) -> None:
    key = store.prompt(IDS).path.key(0)
    lease = store.read(store.match([*IDS, 1]))
    assert store.pool.evict(key) == 0
    del lease
    gc.collect()
    assert store.pool.evict(key) > 0


def test_a_lease_dropped_inside_the_pool_does_not_deadlock(store: Store) -> None:
    """A finalizer may run at any allocation, also while this thread holds a lock."""
    lease = store.read(store.match([*IDS, 1]))
    writer = store.write([*IDS, 1, 2, 3])
    with store.pool._lock, store._waiters._lock:
        del lease, writer
        gc.collect()
    statistics = store.statistics()
    assert (statistics.reserved_bytes, statistics.aborts) == (0, 1)
    assert store.pool.evict(store.prompt(IDS).path.key(0)) > 0


def test_a_released_lease_is_of_no_use(store: Store) -> None:
    with store.read(store.match([*IDS, 1])) as lease:
        layer = lease.layer(1)
    lease.release()
    for use in (
        lambda: lease.layer(1),
        lambda: layer.read("keys"),
        lambda: layer.blocks("keys"),
        lambda: lease.verify(),
        lambda: lease.record(lease.records[0]),
    ):
        with pytest.raises(LeaseError, match="released"):
            use()


def test_destinations_that_do_not_fit(store: Store) -> None:
    with store.read(store.match([*IDS, 1])) as lease:
        layer = lease.layer(1)
        read_only = np.zeros((2, 40, 4), np.float32)
        read_only.flags.writeable = False
        for array, message in (
            (np.zeros((2, 39, 4), np.float32), r"\[2, 40, 4\]"),
            (np.zeros((1, 40, 4), np.float32), r"\[2, 40, 4\]"),
            (np.zeros((2, 40, 4), np.float64), "float64"),
            (np.zeros((2, 40, 8), np.float32)[..., ::2], "gaps"),
            (np.zeros((2, 40, 4), np.float32)[:, ::-1], "revers"),
            (read_only, "read-only"),
            ([0.0], "NumPy array"),
        ):
            with pytest.raises(LeaseError, match=message):
                layer.copy_to(keys=array)
        whole = np.full((3, 50, 4), -1, np.float32)
        layer.copy_to(keys=whole[:2, 5:45], values=np.empty((2, 40, 4), np.float32))
        assert (whole[:, :5] == -1).all()
        assert (whole[:, 45:] == -1).all()
        assert (whole[2] == -1).all()
        assert whole[:2, 5:45].tobytes() == layer.read("keys").tobytes()


def flip(lease: Lease, group: str, node: int, offset: int = -100) -> None:
    """Damage a record where it lies, as a failing memory module would."""
    held = next(each for each in lease.records if each.layout.group.name == group and each.name.node == node)
    at = offset if offset >= 0 else held.layout.header_bytes
    lease._hold.pool._tier.view(held.slot)[at] ^= 1


@pytest.mark.parametrize(
    ("group", "node", "offset", "left"),
    [
        ("state", 2, -1, 32),
        ("window", 2, -1, 32),
        ("attention", 2, -1, 32),
        ("attention", 1, -1, 0),
        ("attention", 0, 200, 0),
        ("state", 2, 8, 32),
    ],
)
def test_a_damaged_record_is_the_next_best_candidate(
    store: Store, group: str, node: int, offset: int, left: int
) -> None:
    match = store.match([*IDS, 1])
    assert [candidate.tokens for candidate in match.candidates] == [40, 32]
    with store.read(match) as lease:
        flip(lease, group, node, offset)
        assert [held.layout.group.name for held in lease.verify()] == [group]
    if left:
        with store.read(match, verify=True) as lease:
            assert lease.tokens == left
            check_lease(lease, store.prompt(IDS))
    else:
        with pytest.raises(LeaseGoneError, match="damaged or evicted"):
            store.read(match, verify=True)
    assert store.match([*IDS, 1]).tokens == left
    assert store.statistics().damaged_records == 1
    write(store, IDS, (32, 40))
    with store.read(store.match([*IDS, 1]), verify=True) as lease:
        assert lease.tokens == 40
        check_lease(lease, store.prompt(IDS))


def test_a_damaged_header_is_not_taken_for_another_records(store: Store) -> None:
    """A whole and valid record of another prefix in the slot is damage too."""
    other = [(17 * number) % 1000 for number in range(40)]
    write(store, other)
    match = store.match([*IDS, 1])
    with store.read(match) as lease, store.read(store.match([*other, 1])) as foreign:
        tier = store.pool._tier
        for held, wrong in zip(lease.records, foreign.records, strict=True):
            if held.layout.group.name == "state":
                tier.view(held.slot)[:] = bytes(tier.view(wrong.slot))
    with store.read(match, verify=True) as lease:
        assert lease.tokens == 32


def test_reading_several_spans_in_parts() -> None:
    ids = [1, 2, 3]
    with open_store(spans(2), dram="64MiB") as store:
        write(store, ids)
        with store.read(store.match([*ids, 1])) as lease:
            prompt = store.prompt(ids)
            for layer in (0, 1, 2):
                views = lease.layer(layer).blocks("keys")
                expected = token_values(store.spec, prompt, layer, "keys", 0, 3)
                assert np.concatenate(views, axis=1).tobytes() == expected.tobytes()


def test_every_candidate_of_a_dense_model_can_be_read() -> None:
    with open_store(dense(B), dram="4MiB") as store:
        write(store, IDS)
        match = store.match([*IDS, 1])
        assert [candidate.tokens for candidate in match.candidates] == [40, 32, 16]
        for candidate in match.candidates:
            with store.read(match.at(candidate.tokens), verify=True) as lease:
                check_lease(lease, store.prompt(IDS))
