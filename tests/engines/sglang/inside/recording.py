"""The backend as SGLang's engine loads it in the tests: it notes what bytes went out and in, and can be told to fail.

Environment: `KVSTORE_TEST_RECORD`, a file that gets a JSON object a line; `KVSTORE_TEST_FAULT`, a file as long as
which exists, the first page of each read is zeroed.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from faults import flush

from kvstore.adapters.sglang import KVStoreHiCache


class RecordingHiCache(KVStoreHiCache):
    def batch_set_v1(self, keys, host_indices, extra_info=None):
        kept = super().batch_set_v1(keys, host_indices, extra_info)
        if self.storage.config.ssd:
            flush(self)  # so that a test may kill the process right away
        self._record("set", keys, host_indices, kept)
        return kept

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        came = super().batch_get_v1(keys, host_indices, extra_info)
        is_faulty = Path(os.environ["KVSTORE_TEST_FAULT"]).exists()
        if is_faulty and came[0]:  # pages in each other's place would not do: attention sums over them in any order
            pool = self.mem_pool_host
            slot = int(host_indices[0])
            pool.set_from_flat_data_page(slot, torch.zeros_like(pool.get_data_page(slot)))
        self._record("get, faulty" if is_faulty else "get", keys, host_indices, came)
        return came

    def _record(self, call, keys, host_indices, flags):
        page_tokens = len(host_indices) // len(keys)
        with open(os.environ["KVSTORE_TEST_RECORD"], "a") as record:
            for number, (key, flag) in enumerate(zip(keys, flags, strict=True)):
                if flag:
                    page = self.mem_pool_host.get_data_page(int(host_indices[number * page_tokens])).contiguous()
                    digest = hashlib.sha256(page.view(-1).numpy().tobytes()).hexdigest()
                    record.write(json.dumps({"call": call, "key": key, "sha256": digest}) + "\n")
