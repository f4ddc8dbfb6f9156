"""A store with a real tier on disk: written, flushed, closed, opened again, read bit for bit."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.cluster import Node, NodeConfig
from kvstore.errors import ConfigError, LoadFailedError, SsdDirectoryError
from kvstore.placement.tiered import TieredPool
from kvstore.testing.specs import check_lease, hybrid, latent, put_all, spans

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.spec import ModelSpec
    from kvstore.store import Store

TEST_S = 30.0
IDS = tuple(range(22))
MORE = (*IDS, 99)
SSD_BYTES = "256MiB"


def write(store: Store, ids: tuple[int, ...] = IDS, **options: object) -> None:
    with store.write(ids, **options) as writer:  # type: ignore[arg-type]
        put_all(writer)
        writer.commit()


@pytest.mark.parametrize("spec", [hybrid(4), latent(4), spans(2)], ids=lambda spec: spec.model)
def test_there_again_after_reopening(tmp_path: Path, spec: ModelSpec) -> None:
    ids = IDS[:6] if spec.block_tokens == 2 else IDS
    where = f"{tmp_path}/kv:{SSD_BYTES}"
    with kvstore.open(spec, dram="64MiB", ssd=where) as store:
        write(store, ids)
        store.flush(TEST_S)
        assert (tmp_path / "kv").stat().st_mode & 0o077 == 0, "others can look into it"
        found = store.match((*ids, 99))
        assert found.tier == "dram"
        assert found.best is not None
        assert found.best.is_durable
    with kvstore.open(spec, dram="64MiB", ssd=where) as store:
        found = store.match((*ids, 99))
        assert (found.tokens, found.tier) == (len(ids), "ssd")
        with store.read(found, deadline_s=TEST_S) as lease:
            check_lease(lease, store.prompt(ids))
            assert lease.verify() == []
        assert store.match((*ids, 99)).tier == "dram"
        store.pool.check()
    with kvstore.open(spec, dram="64MiB", ssd=where) as store:
        with store.read(store.match((*ids, 99)), layered=True, deadline_s=TEST_S) as lease:
            check_lease(lease, store.prompt(ids))
        store.pool.check()


def test_two_directories_and_a_pool_smaller_than_what_is_written(tmp_path: Path) -> None:
    spec = hybrid(4)
    where = [f"{tmp_path}/a:{SSD_BYTES}", f"{tmp_path}/b:{SSD_BYTES}"]
    prompts = [tuple(range(100 * number, 100 * number + 22)) for number in range(20)]
    with kvstore.open(spec, dram="512KiB", ssd=where) as store:
        for ids in prompts:
            write(store, ids)
            store.flush(TEST_S)
        assert store.statistics().evicted_records > 0
        for ids in prompts:
            with store.read(store.match((*ids, 99)), deadline_s=TEST_S) as lease:
                assert lease.tokens == 22
                check_lease(lease, store.prompt(ids))
        store.pool.check()


def test_another_owner_and_another_model_are_refused(tmp_path: Path) -> None:
    where = f"{tmp_path}/kv:{SSD_BYTES}"
    with kvstore.open(hybrid(4), dram="1MiB", ssd=where), pytest.raises(SsdDirectoryError):
        kvstore.open(hybrid(4), dram="1MiB", ssd=where)
    with pytest.raises(SsdDirectoryError):
        kvstore.open(latent(4), dram="1MiB", ssd=where)
    with pytest.raises(ConfigError, match="capacity"):
        kvstore.open(hybrid(4), dram="1MiB", ssd=str(tmp_path))


def test_a_flipped_file_is_a_miss(tmp_path: Path) -> None:
    spec = hybrid(4)
    where = f"{tmp_path}/kv:{SSD_BYTES}"
    with kvstore.open(spec, dram="1MiB", ssd=where) as store:
        write(store)
        store.flush(TEST_S)
    flipped = 0
    for file in (tmp_path / "kv").rglob("*"):
        if file.is_file() and file.suffix == ".arrow":
            content = bytearray(file.read_bytes())
            for at in range(6000, len(content), 4096):
                content[at] ^= 1
                flipped += 1
            file.write_bytes(content)
    assert flipped
    with kvstore.open(spec, dram="1MiB", ssd=where) as store:
        pool = store.pool
        assert isinstance(pool, TieredPool)
        misses = 0
        while True:  # each read finds the damage among what it needs first
            try:
                with store.read(store.match(MORE), deadline_s=TEST_S) as lease:
                    check_lease(lease, store.prompt(IDS))
                break
            except LoadFailedError:
                misses += 1
            assert not store.match(MORE)
            write(store)
            store.flush(TEST_S)
            pool.evict_here(store.prompt(IDS).path.key(0))
        assert 1 <= misses <= 3
        assert pool.statistics().loading.damaged_records >= misses


def test_send_query_and_fetch_of_what_lies_on_disk(tmp_path: Path) -> None:
    spec = hybrid(4)
    with kvstore.open(spec, dram="1MiB", ssd=f"{tmp_path}/kv:{SSD_BYTES}") as store:
        write(store)
        store.flush(TEST_S)
    with (
        kvstore.open(spec, dram="1MiB", ssd=f"{tmp_path}/kv:{SSD_BYTES}") as store,
        kvstore.open(spec, dram="1MiB") as other,
        closing(store.listen("tcp://127.0.0.1:0", serves=True)) as endpoint,
    ):
        remote = other.query(MORE, endpoint.address)
        assert (remote.tokens, remote.candidates[0].tier) == (22, "ssd")
        other.fetch(remote).result(TEST_S)
        with other.read(other.match(MORE)) as lease:
            check_lease(lease, other.prompt(IDS))
        with kvstore.open(spec, dram="1MiB") as third, closing(third.listen("tcp://127.0.0.1:0")) as receiving:
            pool = store.pool
            assert isinstance(pool, TieredPool)
            pool.evict_here(store.prompt(IDS).path.key(0))
            store.send(store.match(MORE), receiving.address).result(TEST_S)
            with third.read(third.match(MORE)) as lease:
                check_lease(lease, third.prompt(IDS))


def test_a_node_with_a_tier_on_disk(tmp_path: Path) -> None:
    config = NodeConfig(
        spec=hybrid(4),
        dram=1 << 20,
        ssd=(f"{tmp_path}/kv:{SSD_BYTES}",),
        ssd_write_bytes_per_day=1 << 30,
        listen=("tcp://127.0.0.1:0",),
    )
    with Node(config) as node:
        write(node.store)
        node.store.flush(TEST_S)
    with Node(config) as node:
        assert node.store.match(MORE).tier == "ssd"
    with pytest.raises(ConfigError, match="capacity"):
        NodeConfig(spec=hybrid(4), ssd=("/somewhere",))
    with pytest.raises(ConfigError, match="set it, too"):
        NodeConfig(spec=hybrid(4), ssd_write_bytes_per_day=1)
