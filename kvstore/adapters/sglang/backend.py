"""The class that SGLang's dynamic storage backend loads. Needs SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult

from kvstore.adapters.sglang.config import BackendConfig
from kvstore.adapters.sglang.pools import ANCHOR
from kvstore.adapters.sglang.position import Position
from kvstore.adapters.sglang.storage import Asked, PageStorage
from kvstore.adapters.sglang.versions import check_version, installed_version
from kvstore.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.adapters.sglang.counts import BackendStatistics


class KVStoreHiCache(HiCacheStorage):  # type: ignore[misc]  # without SGLang its base is Any
    """SGLang's host pools over a store; docs/sglang.md.

    What cannot be stored or read is answered with False, None or 0, and never raised. `clear` raises.

    Args:
        storage_config: SGLang's `HiCacheStorageConfig`, with the settings in its `extra_config`.
        kwargs: unused; SGLang passes them.

    Raises:
        ConfigError: a setting is wrong, missing or unknown. UnavailableError: an SGLang that this was not tested with.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        extra = storage_config.extra_config or {}
        config = BackendConfig.parse(extra)
        version = check_version(installed_version(), allow_untested=config.allow_untested_version)
        self._enable_metrics = bool(getattr(storage_config, "enable_storage_metrics", False))
        self.storage = PageStorage(
            config,
            Position.of(storage_config),
            model=storage_config.model_name,
            version=version,
            is_zero_copy=bool(extra.get("interface_v1", 0)),
        )

    # Pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the anchor pool.

        Raises:
            ConfigError: it cannot be stored.
        """
        super().register_mem_pool_host(mem_pool_host)
        self.storage.register(ANCHOR, mem_pool_host, kv_dtype=_kv_dtype())

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Take a further pool.

        Raises:
            ConfigError: it cannot be stored.
        """
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self.storage.register(str(host_pool_name), host_pool, kv_dtype=_kv_dtype())

    def on_host_pools_registered(self) -> None:
        """Open the store.

        Raises:
            ConfigError, AttachError, SpecError, and whatever else `kvstore.open` raises: this is the start.
        """
        self.storage.open()

    # Finding

    def exists(self, key: str) -> bool:
        return self.storage.count_prefix([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return self.storage.count_prefix(keys)

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Sequence[Any] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        asked = [Asked(str(each.name), each.hit_policy.value, len(each.keys or ())) for each in pool_transfers or ()]
        found = self.storage.restorable(keys, asked)
        hits = {PoolName(name): pages for name, pages in found.pool_pages.items()}
        return PoolTransferResult(found.pages, hits, list(found.lengths))

    # Pages where they lie

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return self.storage.read(ANCHOR, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return self.storage.write(ANCHOR, keys, host_indices)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {each.name: self.storage.read(str(each.name), each.keys or [], each.host_indices) for each in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {each.name: self.storage.write(str(each.name), each.keys or [], each.host_indices) for each in transfers}

    # Pages as tensors

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        targets = list(target_locations) if target_locations is not None else [None] * len(keys)
        came = self.storage.read_tensors(keys, targets)
        return [target if has_come else None for target, has_come in zip(targets, came, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all(self.storage.write_tensors(keys, list(values) if values is not None else [None] * len(keys)))

    # The backend itself

    def clear(self) -> bool:
        """Remove everything of this model and tenant from the store. True.

        Raises:
            UnavailableError: something is left. SGLang does not look at what this returns: it says that the storage
            was cleared unless this raises, and who has replaced the weights would read what the old ones computed.
        """
        if not self.storage.clear():
            raise UnavailableError("the store was not cleared: the log of kvstore.sglang says why; try again")
        return True

    def get_stats(self) -> Any:
        """For SGLang's own metrics, if they are enabled: pages and GB/s of each call since the last time."""
        if not self._enable_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        metrics = StorageMetrics()
        for pages, rate in self.storage.take_samples("read"):
            metrics.prefetch_pgs.append(pages)
            metrics.prefetch_bandwidth.append(rate)
        for pages, rate in self.storage.take_samples("written"):
            metrics.backup_pgs.append(pages)
            metrics.backup_bandwidth.append(rate)
        return metrics

    def statistics(self) -> BackendStatistics:
        """Counters of this backend."""
        return self.storage.statistics()

    def flush(self, deadline_s: float | None = None) -> bool:
        """Wait until the pages that were written before are durable; whether they are.

        Args:
            deadline_s: `call_deadline_s` by default.
        """
        return self.storage.flush(deadline_s)

    def close(self) -> None:
        self.storage.close()


def _kv_dtype() -> str:
    """What SGLang was told of the cache's element type; empty if it was to choose."""
    try:
        from sglang.srt.runtime_context import get_server_args

        told = str(getattr(get_server_args(), "kv_cache_dtype", "auto") or "auto")
    except (ImportError, AttributeError, LookupError, RuntimeError, ValueError):
        return ""  # there is no server: SGLang's parts are used by themselves
    return "" if told == "auto" else told
