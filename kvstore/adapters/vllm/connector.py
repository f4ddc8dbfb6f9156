"""vLLM's connector interface, translated: nothing is decided here.

Loaded by vLLM from `kv_connector="KVStoreConnector"` and `kv_connector_module_path="kvstore.adapters.vllm.connector"`.
The scheduler's hooks go to `Scheduling`, a worker's to `Worker`. Read in vLLM 0.32:
`distributed/kv_transfer/kv_connector/v1/base.py`, `v1/core/sched/scheduler.py`,
`v1/worker/kv_connector_model_runner_mixin.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvstore.adapters.paged import PagedMapping
from kvstore.adapters.vllm.config import ConnectorConfig
from kvstore.adapters.vllm.engine import EngineFacts
from kvstore.adapters.vllm.metadata import NULL_PAGE, StepOrders, WorkerHalf, WorkerReport
from kvstore.adapters.vllm.opening import open_for
from kvstore.adapters.vllm.partial_pages import PartialPages
from kvstore.adapters.vllm.scheduling import Scheduling
from kvstore.adapters.vllm.search import Searches
from kvstore.adapters.vllm.statistics import KVStorePromMetrics, KVStoreStats
from kvstore.adapters.vllm.versions import check_version
from kvstore.adapters.vllm.working import Worker
from kvstore.spec import save_spec

logger = logging.getLogger(__name__)


@dataclass
class OrdersMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """A step's orders on their way to the workers."""

    orders: StepOrders = field(default_factory=StepOrders)


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A worker's report on its way to the scheduler."""

    report: WorkerReport = field(default_factory=WorkerReport)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """With that of another rank."""
        assert isinstance(other, ReportMetadata)
        return ReportMetadata(self.report.join(other.report))


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Prefix reuse and hand-over through a kvstore (docs/vllm.md).

    Raises:
        ConfigError: a setting is unknown, missing, or one that a cache must not run with.
        UnavailableError: this vLLM was not tested. UnsupportedModelError: its pages cannot be mapped.
        As `kvstore.open` where the scheduler owns the store; SpecError: the node has another model's.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = ConnectorConfig.parse(self._kv_transfer_config.kv_connector_extra_config)
        warning = check_version(vllm.__version__, allow_untested=config.allow_untested_version)
        if warning:
            logger.warning(warning)
        self._config = config
        facts = EngineFacts.read(vllm_config, kv_cache_config)
        facts.check(config)
        spec = facts.spec(config)
        self._scheduling: Scheduling | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.WORKER:
            return  # How tensors lie is known when they are registered.
        if config.spec_file:
            save_spec(spec, config.spec_file)
        store = open_for(spec, config)
        searches = Searches(
            store, prepare_deadline_s=config.prepare_deadline_s, fetch_deadline_s=config.fetch_deadline_s
        )
        self._partial_pages = PartialPages(facts.groups)
        self._scheduling = Scheduling(
            spec,
            store,
            searches,
            facts.policy(spec.block_tokens),
            may_load=facts.may_load,
            may_save=facts.may_save and config.saves,
            peers=config.peers,
            saves_decoded=config.saves_decoded,
            partial_pages=self._partial_pages,
            loads_by_layer=config.loads_by_layer,
        )

    # What the engine asks of the class

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what a prefill leaves for another instance lies in the store, not in pages that may be given up."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether layers' hooks are used: a graph of the whole forward would leave them out."""
        return ConnectorConfig.needs_layer_hooks(extra_config)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVStoreStats | None:
        """Statistics as they came from another process."""
        return KVStoreStats(data={} if data is None else data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVStorePromMetrics | None:
        """What Prometheus is shown."""
        return KVStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """End everything."""
        if self._scheduling is not None:
            self._scheduling.close()
        if self._worker is not None:
            self._worker.close()

    # In the scheduler

    @property
    def _scheduler_half(self) -> Scheduling:
        assert self._scheduling is not None, "a scheduler's hook was called in a worker"
        return self._scheduling

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The scheduler's pages."""
        self._partial_pages.bind(gpu_block_pool)
        self._scheduler_half.unfilled_pages.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        self._scheduler_half.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What can be loaded; beside the steps, unless `load` is `layered`, which models with states refuse."""
        return self._scheduler_half.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has pages."""
        self._scheduler_half.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The workers' orders for a step."""
        return OrdersMetadata(self._scheduler_half.orders(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have done."""
        told = connector_output.kv_connector_worker_meta
        self._scheduler_half.reported(
            connector_output.finished_recving or (),
            connector_output.failed_recving or (),
            told.report if isinstance(told, ReportMetadata) else None,
        )

    def reset_cache(self) -> bool | None:
        """Forget everything that is kept."""
        return self._scheduler_half.reset()

    def get_kv_connector_stats(self) -> KVStoreStats | None:
        """What was counted since the last call; the scheduler counts for the workers, too."""
        counted = self._scheduling.take_counters() if self._scheduling is not None else {}
        return KVStoreStats(data=counted) if counted else None

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended; its pages may go at once."""
        return False, self._scheduler_half.finish(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, for models with several cache groups."""
        return False, self._scheduler_half.finish(request)

    # In a worker

    @property
    def _worker_half(self) -> WorkerHalf:
        assert self._worker is not None, "a worker's hook was called in the scheduler, or before register_kv_caches"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The engine's tensors."""
        facts = EngineFacts.read(self._vllm_config, self._kv_cache_config, has_tensors=True)
        mapping = PagedMapping(facts.spec(self._config), facts.groups, facts.shard, null_page=NULL_PAGE)
        config = self._config
        self._worker = Worker(
            mapping,
            page_count=self._kv_cache_config.num_blocks,
            again_s=config.attach_again_s,
            socket=config.socket,
            saves_by_layer=config.saves_by_layer,
        )
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, OrdersMetadata)
        self._worker_half.take_orders(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads."""
        self._worker_half.begin_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A layer's forward is next."""
        self._worker_half.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """A layer's forward has been asked for."""
        self._worker_half.save_layer(layer_name)

    def wait_for_save(self) -> None:
        """The step's forward has been asked for."""
        self._worker_half.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that have ended."""
        finished, failed = self._worker_half.finished_loads()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that a load within this step left unfilled."""
        return self._worker_half.load_errors()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The worker's report."""
        report = self._worker_half.report()
        return None if report is None else ReportMetadata(report)
