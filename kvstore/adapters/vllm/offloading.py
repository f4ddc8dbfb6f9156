"""kvstore as a secondary tier of vLLM's tiered offloading (docs/foreign.md).

vLLM keeps the group logic and the copies to and from the device; here whole rows of its host memory are kept under its
own block hashes. It is loaded by module path:

    "secondary_tiers": [{"type": "KVStoreSecondaryTier", "module_path": "kvstore.adapters.vllm.offloading",
                         "weights": "sha256:...", "dram": "8GiB", "ssd": ["/var/cache/kv:200GiB"]}]
"""

from __future__ import annotations

import logging
import os
import platform
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

import vllm
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import Locality, LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kvstore._native import addresses_of
from kvstore.adapters.vllm.rows import RowJobs, Rows
from kvstore.adapters.vllm.tier_config import TierConfig
from kvstore.adapters.vllm.tier_store import TierStore
from kvstore.adapters.vllm.versions import check_version
from kvstore.errors import SpecError
from kvstore.foreign import ForeignNamespace
from kvstore.limits import LOAD_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.foreign import ForeignStatistics

LOG = logging.getLogger("kvstore.vllm")

_FACT_CHARACTERS = 256


class KVStoreSecondaryTier(SecondaryTierManager):  # type: ignore[misc]
    """Keeps rows of vLLM's host memory. All calls come from the scheduler's thread, and none of them waits.

    Args:
        offloading_spec, primary_kv_view, tier_type, backpressure_detector: as vLLM passes them.
        locality: as for vLLM's own tiers.
        settings: see `TierConfig`.

    Raises:
        UnavailableError: a vLLM that this was not tested with. ConfigError: a setting. SpecError: vLLM makes its block
        hashes in a way by which nothing could be found again, or the wrong cache might be. Otherwise as `kvstore.open`.
    """

    medium: ClassVar[Any] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = TierConfig.parse(settings)
        warning = check_version(vllm.__version__, allow_untested=config.allow_untested_version)
        if warning:
            LOG.warning("%s", warning)
        self.locality = None if locality is None else Locality(locality)
        self._hash_root = hash_root(config.hash_algorithm)
        self._is_root_checked = False
        row_bytes = self.block_size_bytes
        namespace = namespace_of(offloading_spec.config, config, self._hash_root, row_bytes)
        self._source = TierStore(config, namespace)
        rows = Rows(int(addresses_of([primary_kv_view])[0]), row_bytes, len(primary_kv_view))
        self._jobs = RowJobs(self._source, rows, load_deadline_s=config.load_deadline_s)
        self._failed: dict[str, set[bytes]] = {}
        """By running request, rows that could not be loaded for it: it is not told again that they are there."""
        self._loads: dict[int, str] = {}
        """Requests of the loads under way, by number of the job."""
        self._asked = None if self._source.is_own else _AttachedLookup(tier_type, self._jobs)

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        if key in self._failed.get(req_context.req_id, ()):
            return LookupResult.MISS
        if self._asked is None:
            (found,) = self._jobs.find([key])
        else:
            found = self._asked.lookup(key, req_context)
            if found is None:
                return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        self._jobs.begin(job_metadata.job_id, list(job_metadata.keys), job_metadata.chunk_ids, is_load=False)

    def submit_load(self, job_metadata: Any) -> None:
        self._jobs.begin(job_metadata.job_id, list(job_metadata.keys), job_metadata.chunk_ids, is_load=True)
        self._loads[job_metadata.job_id] = job_metadata.req_context.req_id

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for end in self._jobs.finished():
            has_all = all(end.has_come)
            request = self._loads.pop(end.job_id, "")
            if request in self._failed:
                # What is there and cannot be loaded would be asked for again, step by step, for ever.
                self._failed[request].update(key for key, has in zip(end.keys, end.has_come, strict=True) if not has)
            come = tuple(key for key, has_come in zip(end.keys, end.has_come, strict=True) if has_come)
            results.append(
                JobResult(
                    job_id=end.job_id,
                    success=has_all,
                    successful_keys=come if end.is_load and come and not has_all else None,
                    transfer_time=end.seconds,
                    transfer_bytes=len(come) * self.block_size_bytes,
                )
            )
        return results

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        if not self._is_root_checked:
            check_root(self._hash_root)
            self._is_root_checked = True
        self._failed[req_context.req_id] = set()
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        self._failed.pop(req_context.req_id, None)
        if self._asked is not None:
            self._asked.cleanup(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        if self._asked is not None:
            self._asked.flush()

    def statistics(self) -> ForeignStatistics | None:
        """Counters of the store; None while it is gone."""
        return self._jobs.statistics()

    def drain_jobs(self) -> None:
        self._jobs.drain(LOAD_DEADLINE_S)

    def shutdown(self) -> None:
        if self._asked is not None:
            self._asked.shutdown()
        self._source.close()


class _AttachedLookup(AsyncLookupManager):  # type: ignore[misc]
    """Asks the process that owns the store, in a thread of vLLM's own for this."""

    def __init__(self, tier_type: str, jobs: RowJobs) -> None:
        self._jobs = jobs
        super().__init__(tier_type)

    def batch_lookup(self, keys: Sequence[Any], req_context: Any) -> Iterable[bool]:
        return self._jobs.find(keys)


def hash_root(algorithm: str) -> bytes | None:
    """What vLLM's chains of block hashes begin with; None where that differs from process to process.

    Raises:
        SpecError: vLLM has no such hash.
    """
    try:
        function = get_hash_fn_by_name(algorithm)
    except ValueError as error:
        raise SpecError(f"vLLM has no prefix_caching_hash_algo {algorithm!r}; set sha256 or sha256_cbor") from error
    # vLLM seeds a cryptographic hash with a constant, unless it is told another seed; versions before 0.32 had none.
    seed = os.environ.get("PYTHONHASHSEED", getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None))
    return None if seed is None or not algorithm.startswith("sha256") else function(seed)


def check_root(expected: bytes | None) -> None:
    """Once vLLM has begun: raise `SpecError` if its block hashes are made in another way than was assumed."""
    root = getattr(kv_cache_utils, "NONE_HASH", None)
    if root != expected:
        raise SpecError(
            f"vLLM's block hashes begin with {root!r}, and the tier was set up for {expected!r}: set its "
            "hash_algorithm to vLLM's prefix_caching_hash_algo, sha256 or sha256_cbor, and PYTHONHASHSEED to one fixed "
            "value, or none, in all processes"
        )


def namespace_of(config: Any, settings: TierConfig, root: bytes | None, row_bytes: int) -> ForeignNamespace:
    """Whose rows these are.

    Args:
        config: vLLM's `OffloadingConfig`.
        settings: the tier's.
        root: see `hash_root`.
        row_bytes: of vLLM's host memory.
    """
    parallel = config.parallel
    is_any = parallel.is_parallelism_agnostic or config.replicated_layout
    sizes = {name: getattr(parallel, name) for name in ("tp_size", "pp_size", "pcp_size", "dcp_size", "world_size")}
    facts = {
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "dtype": config.model.dtype,
        "kv_cache_layout": config.kv_cache_layout,
        "canonical_layout": config.canonical_layout,
        "replicated_layout": config.replicated_layout,
        "groups": [(group.group_id, group.tokens_per_block, group.layer_names) for group in config.groups],
        "parallel": "any" if is_any else sorted(sizes.items()),
        "platform": current_platform.device_name,
        "python": ".".join(platform.python_version_tuple()[:2]) if settings.hash_algorithm == "sha256" else "any",
    }
    names = {*(str(group.group_id) for group in config.groups), *(str(number) for number in range(len(config.groups)))}
    return ForeignNamespace(
        model=settings.model or config.model.name,
        weights=settings.weights,
        engine="vllm",
        version=vllm.__version__.partition("+")[0],
        hash_algorithm=settings.hash_algorithm,
        hash_root=root,
        groups=tuple((name, row_bytes) for name in sorted(names)),
        rank=0 if is_any else parallel.rank,
        ranks=1 if is_any else parallel.world_size,
        layout=tuple(sorted((name, _text(value)) for name, value in facts.items())),
        chunk_bytes=settings.chunk_bytes,
    )


def _text(value: object) -> str:
    """A fact as a text that is not too long for a name."""
    plain = repr(value)
    return plain if len(plain) <= _FACT_CHARACTERS else sha256(plain.encode()).hexdigest()
