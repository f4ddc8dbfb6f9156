"""vLLM's tiered offloading on its CPU platform, which vLLM refuses: the copies to and from pages, in plain torch.

Only so that secondary tiers can be tested without a GPU; runs in the engine's environment, loaded by vLLM as
`spec_name="CpuTieringSpec", spec_module_path="cpu_tiering"`.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies at once, and says so when it is asked."""

    def __init__(self, caches: Any, region: Any, row_bytes: int) -> None:
        self._caches = caches
        self._rows = region._base.view(-1, row_bytes)
        self._done: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, is_store=False)

    def _copy(self, job_id: int, pages: Any, chunks: Any, *, is_store: bool) -> bool:
        begin = time.monotonic()
        number = size_bytes = 0
        for group, count in enumerate(pages.group_sizes):
            for _ in range(count):
                row, at = self._rows[int(chunks.block_ids[number])], 0
                for ref in self._caches.group_data_refs[group]:
                    tensor = self._caches.tensors[ref.tensor_idx].tensor
                    page = tensor[int(pages.block_ids[number])].view(torch.int8).reshape(-1)[: ref.page_size_bytes]
                    part = row[at : at + page.numel()]
                    (part if is_store else page).copy_(page if is_store else part)
                    at += page.numel()
                number += 1
                size_bytes += at
        self._done.append(TransferResult(job_id, True, size_bytes, time.monotonic() - begin))
        return True

    def get_finished(self) -> list[Any]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        return


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """Tiered offloading with that worker."""

    def get_manager(self) -> Any:
        manager = super().get_manager()
        # The worker, which is in this process, has mapped it before; an engine that is killed leaves no file.
        with suppress(FileNotFoundError):
            os.unlink(self._scheduler_mmap.mmap_path)
        return manager

    def get_worker(self, kv_caches: Any) -> CopyWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyWorker(kv_caches, region, self.kv_bytes_per_chunk)
        return self._worker
