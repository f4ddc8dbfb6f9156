"""The backend as SGLang's engine loads it in the tests: it notes what bytes went out and in, and can be told to fail.

Environment: `KVSTORE_TEST_RECORD`, a file that gets a JSON object a line; `KVSTORE_TEST_FAULT`, a file as long as
which exists, what is read is wrong. It has a JSON object with `do`: `zero` (the first page of each read), `plant` (the
pages of `keys` are found and read under whatever names), `claim` (all is found, and nothing read).
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from kvstore.adapters.sglang import KVStoreHiCache


def fault():
    path = Path(os.environ["KVSTORE_TEST_FAULT"])
    return json.loads(path.read_text()) if path.exists() else {"do": ""}


class RecordingHiCache(KVStoreHiCache):
    def batch_exists(self, keys, extra_info=None):
        wrong = fault()
        if wrong["do"] == "claim":
            return len(keys)
        if wrong["do"] == "plant":
            return super().batch_exists(wrong["keys"][: len(keys)], extra_info)
        return super().batch_exists(keys, extra_info)

    def batch_set_v1(self, keys, host_indices, extra_info=None):
        kept = super().batch_set_v1(keys, host_indices, extra_info)
        self._record("set", keys, host_indices, kept)
        return kept

    def batch_get_v1(self, keys, host_indices, extra_info=None):
        wrong = fault()
        if wrong["do"] == "claim":
            came = [True] * len(keys)
        elif wrong["do"] == "plant":
            came = super().batch_get_v1(wrong["keys"][: len(keys)], host_indices, extra_info)
        else:
            came = super().batch_get_v1(keys, host_indices, extra_info)
        if wrong["do"] == "zero" and came[0]:  # pages in each other's place would not do: attention sums in any order
            pool = self.mem_pool_host
            slot = int(host_indices[0])
            pool.set_from_flat_data_page(slot, torch.zeros_like(pool.get_data_page(slot)))
        self._record("get, faulty" if wrong["do"] else "get", keys, host_indices, came)
        return came

    def _record(self, call, keys, host_indices, flags):
        page_tokens = len(host_indices) // len(keys)
        with open(os.environ["KVSTORE_TEST_RECORD"], "a") as record:
            for number, (key, flag) in enumerate(zip(keys, flags, strict=True)):
                if flag:
                    page = self.mem_pool_host.get_data_page(int(host_indices[number * page_tokens])).contiguous()
                    digest = hashlib.sha256(page.view(-1).numpy().tobytes()).hexdigest()
                    row = {"call": call, "key": key, "rank": self.storage.position.tp_rank, "sha256": digest}
                    record.write(json.dumps(row) + "\n")
