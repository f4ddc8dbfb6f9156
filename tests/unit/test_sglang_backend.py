"""The class that SGLang loads, over a stand-in for SGLang's own interface (0.5.23): names, arguments and answers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.errors import ConfigError, UnavailableError
from tests.unit.sglang_pools import MambaPoolHost, MHATokenToKVPoolHost, hashes, slots_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class PoolName(StrEnum):
    KV = "kv"
    MAMBA = "mamba"


class PoolHitPolicy(StrEnum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


class HiCacheStorage:
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        self.registered_pools = {**getattr(self, "registered_pools", {}), host_pool_name: host_pool}


@dataclass
class StorageMetrics:
    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


@pytest.fixture
def backend_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules = {
        "sglang.srt.mem_cache.hicache_storage": (HiCacheStorage, PoolName, PoolTransferResult),
        "sglang.srt.observability.metrics_collector": (StorageMetrics,),
    }
    for name, classes in modules.items():
        parts = name.split(".")
        for count in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(".".join(parts[:count])))
        module = ModuleType(name)
        for each in classes:
            setattr(module, each.__name__, each)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kvstore.adapters.sglang.backend", raising=False)
    module = importlib.import_module("kvstore.adapters.sglang.backend")
    monkeypatch.setattr(module, "installed_version", lambda: "0.5.23")
    yield module.KVStoreHiCache
    sys.modules.pop("kvstore.adapters.sglang.backend", None)


def storage_config(**extra: Any) -> SimpleNamespace:
    return SimpleNamespace(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, dp_rank=0, dcp_size=1,
        is_mla_model=False, should_split_heads=False, enable_storage_metrics=True, model_name="tiny",
        extra_config={"backend_name": "kvstore", "weights": "random", "dram": "8MiB", **extra},
    )  # fmt: skip


@pytest.fixture
def hybrid(backend_class: Any) -> Iterator[Any]:
    backend = backend_class(storage_config(interface_v1=1), {})
    kv, states = MHATokenToKVPoolHost(), MambaPoolHost()
    backend.register_mem_pool_host(kv)
    backend.register_mem_host_pool_v2(kv, PoolName.KV)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    backend.on_host_pools_registered()
    yield backend
    backend.close()


def test_pages_and_states_as_the_hybrid_controller_moves_them(hybrid: Any) -> None:
    kv, states = hybrid.mem_pool_host, hybrid.registered_pools[PoolName.MAMBA]
    kv.fill(1)
    states.fill(2)
    page, state = kv.page_bytes(2), states.page_bytes(3)
    keys = hashes(4)

    def transfer(slot: int) -> PoolTransfer:
        return PoolTransfer(PoolName.MAMBA, slots_of([slot], 1), keys[2:3], PoolHitPolicy.TRAILING_PAGES)

    query = PoolTransfer(PoolName.MAMBA, None, keys[3:4], PoolHitPolicy.TRAILING_PAGES)
    assert hybrid.batch_set_v2([transfer(3)]) == {PoolName.MAMBA: [True]}
    assert hybrid.batch_exists_v2(keys, [query]) == PoolTransferResult(0, {}, [])
    assert hybrid.batch_set_v1(keys, slots_of([0, 1, 2, 3])) == [True] * 4
    found = hybrid.batch_exists_v2(keys, [query])
    assert found == PoolTransferResult(3, {PoolName.KV: 4, PoolName.MAMBA: 3}, [3])
    assert found.extra_pool_hit_pages["mamba"] == 3
    kv.zero()
    states.zero()
    assert hybrid.batch_get_v1(keys[:3], slots_of([10, 11, 12])) == [True] * 3
    assert hybrid.batch_get_v2([transfer(5)]) == {PoolName.MAMBA: [True]}
    assert (kv.page_bytes(12), states.page_bytes(5)) == (page, state)
    assert hybrid.batch_exists(keys) == 4
    assert hybrid.exists(keys[1])
    assert not hybrid.exists("0" * 64)
    assert hybrid.clear() is True
    assert hybrid.batch_exists_v2(keys, [query]) == PoolTransferResult(0, {}, [])


def test_empty_and_unknown_transfers(hybrid: Any) -> None:
    assert hybrid.batch_set_v2([]) == {}
    assert hybrid.batch_get_v2([PoolTransfer(PoolName.MAMBA, None, None)]) == {PoolName.MAMBA: []}
    assert hybrid.batch_get_v2([PoolTransfer(PoolName.MAMBA, None, hashes(2))]) == {PoolName.MAMBA: [False, False]}
    assert hybrid.batch_exists_v2([], None) == PoolTransferResult(0, {}, [])


def test_metrics_are_taken_once(hybrid: Any) -> None:
    assert hybrid.batch_set_v1(hashes(3), slots_of([0, 1, 2])) == [True] * 3
    assert hybrid.batch_get_v1(hashes(2), slots_of([0, 1])) == [True] * 2
    stats = hybrid.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [2])
    assert stats.backup_bandwidth[0] > 0
    assert hybrid.get_stats() == StorageMetrics()
    assert (hybrid.statistics().written, hybrid.statistics().read) == (3, 2)


def test_pages_as_tensors(backend_class: Any) -> None:
    backend = backend_class(storage_config())
    pool, keys = MHATokenToKVPoolHost("layer_first"), hashes(3)
    pool.fill(4)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    pages = [pool.get_data_page(page * 4) for page in range(3)]
    assert backend.batch_set(keys[:2], pages[:2]) is True
    assert backend.set(keys[2], None) is False
    targets = [pool.get_dummy_flat_data_page() for _ in keys]
    assert backend.batch_get(keys, targets) == [targets[0], targets[1], None]
    assert backend.get(keys[0], targets[2]) is targets[2]
    assert (targets[2].array == pages[0].array).all()
    assert backend.get(keys[0]) is None
    assert backend.batch_set_v1(keys, slots_of([0, 1, 2])) == [False] * 3  # interface_v1 was not set
    backend.close()


def test_flush_says_whether_pages_are_durable(backend_class: Any, hybrid: Any, tmp_path: Path) -> None:
    assert hybrid.flush() is False  # it has no disk
    settings = {"interface_v1": 1, "ssd": [f"{tmp_path}/kv:64MiB"], "call_deadline_s": 30.0}
    pool, keys = MHATokenToKVPoolHost(), hashes(3)
    pool.fill(5)
    backend = backend_class(storage_config(**settings))
    assert backend.flush() is False  # it is not open
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    assert backend.batch_set_v1(keys, slots_of([0, 1, 2])) == [True] * 3
    assert backend.flush() is True
    bytes_on_disk = b"".join(path.read_bytes() for path in (tmp_path / "kv").rglob("*") if path.is_file())
    assert pool.page_bytes(1)[:64] in bytes_on_disk
    backend.close()
    assert backend.flush() is False


def test_what_is_wrong_is_said_at_the_start(backend_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="drum"):
        backend_class(storage_config(drum="1GiB"))
    monkeypatch.setattr(sys.modules[backend_class.__module__], "installed_version", lambda: "0.7.0")
    with pytest.raises(UnavailableError, match=r"0\.7\.0"):
        backend_class(storage_config())
    backend_class(storage_config(allow_untested_version=True)).close()


def test_the_package_itself_needs_no_sglang() -> None:
    program = (
        "import sys, kvstore.adapters.sglang, kvstore.adapters.sglang.storage\n"
        "assert not any(name.split('.')[0] in ('sglang', 'torch') for name in sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_clearing_that_failed_is_not_taken_for_done(hybrid: Any) -> None:
    """SGLang says that the storage was cleared unless this raises."""
    hybrid.close()
    with pytest.raises(UnavailableError, match="not cleared"):
        hybrid.clear()
