"""Settings of the vLLM connector, the versions it runs with, what it refuses at the start, and what hand-overs say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.adapters.vllm.config import ConnectorConfig
from kvstore.adapters.vllm.engine import EngineFacts
from kvstore.adapters.vllm.handover import Source, Target, answer, read_params
from kvstore.adapters.vllm.opening import (
    FOLDER_LEFT_S,
    FOLDER_PREFIX,
    AttachedStore,
    OwnedStore,
    remove_left_folders,
)
from kvstore.adapters.vllm.stores import shared
from kvstore.adapters.vllm.versions import TESTED_VERSIONS, check_version
from kvstore.errors import ConfigError, KVStoreError, SpecError, TransferError, UnavailableError, UnsupportedModelError
from kvstore.spec import Shard
from kvstore.store import attach_store, open_store
from kvstore.testing.specs import dense, hybrid
from tests.attached.driver import socket_folder
from tests.vllm_requests import keep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]
SPEC = hybrid(4)


# Settings


def test_every_setting_has_a_default_but_the_weights() -> None:
    config = ConnectorConfig.parse({"weights": "seed 0"})
    assert config.is_owner
    assert config.block_tokens == 64
    assert ConnectorConfig.parse({"weights": "seed 0", "dram": "1GiB"}).dram == 1 << 30


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "has no weights"),
        ({"weights": ""}, "weights = '' is not"),
        ({"weights": "w", "drm": "1GiB"}, "has drm; known are"),
        ({"weights": "w", "dram": "a lot"}, "dram = 'a lot' is not a size"),
        ({"weights": "w", "block_tokens": 0}, "block_tokens = 0 is not"),
        ({"weights": "w", "saves": 1}, "saves = 1 is not true or false"),
        ({"weights": "w", "ssd": "/dir:1GiB"}, "ssd = '/dir:1GiB' is not a list"),
        ({"weights": "w", "fetch_deadline_s": 0}, "fetch_deadline_s = 0 is not a number of seconds"),
        ({"weights": "w", "socket": "/s", "dram": "1GiB"}, "so dram cannot be set here"),
        ({"weights": "w", "socket": "/s", "listen": ["tcp://127.0.0.1:0"]}, "so listen cannot be set here"),
        ({"weights": "w", "listen": ["tcp://0.0.0.0:7400"]}, "not a loopback address"),
        ({"weights": "w", "limits": {"quota": "1GiB", "lifetime": 3}}, "limits has lifetime"),
        ({"weights": "w", "limits": {"quota": "none"}}, "quota = 'none' is not a size"),
        ({"weights": "w", "load": "later"}, "load = 'later' is not"),
    ],
)
def test_settings_that_are_none(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConnectorConfig.parse(extra)
    assert message in str(caught.value)


def test_the_page_names_every_setting() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    config = ConnectorConfig.parse({"weights": "w"})
    assert [name for name in vars(config) if f"`{name}`" not in page] == []


# Versions


def test_tested_versions_pass() -> None:
    for version in TESTED_VERSIONS:
        assert check_version(version, allow_untested=False) == ""
        assert check_version(f"{version}+cpu", allow_untested=False) == ""


def test_others_are_refused_unless_allowed() -> None:
    with pytest.raises(UnavailableError) as caught:
        check_version("0.31.9", allow_untested=False)
    assert "allow_untested_version" in str(caught.value)
    assert "silently wrong" in check_version("0.31.9", allow_untested=True)


# What the engine is


class FakeModel:
    """The attributes of vLLM's `ModelConfig` that are read."""

    def __init__(self, **settings: Any) -> None:
        self._settings = {"hidden_size": 64, "_name_or_path": "/models/one", "rope_parameters": {}, **settings}
        self.hf_config = self
        self.hf_text_config = SimpleNamespace()
        self.architectures = ["LlamaForCausalLM"]
        self.dtype = "torch.bfloat16"
        self.quantization: str | None = None
        self.max_model_len = 4096

    def to_json_string(self, *, use_diff: bool) -> str:
        assert not use_diff
        return json.dumps(self._settings)

    def get_total_num_kv_heads(self) -> int:
        return 2


class FullAttentionSpec:
    """Named as vLLM's."""

    block_size = 16
    num_kv_heads = 2
    head_size = head_size_v = 8
    dtype = "bfloat16"


def config_of(**changed: Any) -> Any:
    """A `VllmConfig`, of which `part__name` is another."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "tensor_parallel_size": 1,
            "rank": 0,
        },
        "kv_transfer_config": {
            "kv_load_failure_policy": "recompute",
            "is_kv_consumer": True,
            "is_kv_producer": True,
        },
        "cache_config": {"cache_dtype": "auto"},
        "scheduler_config": {"async_scheduling": False},
    }
    config = SimpleNamespace(model_config=FakeModel(), speculative_config=None)
    for name, value in changed.items():
        part, _, setting = name.partition("__")
        if setting:
            parts[part][setting] = value
        else:
            setattr(config, part, value)
    for part, settings in parts.items():
        setattr(config, part, SimpleNamespace(**settings))
    return config


class SlidingWindowSpec(FullAttentionSpec):
    """Named as vLLM's."""

    sliding_window = 32


def facts_of(*specs: Any, **changed: Any) -> EngineFacts:
    groups = [
        SimpleNamespace(layer_names=[f"model.layers.{number}.attn"], kv_cache_spec=spec)
        for number, spec in enumerate(specs or (FullAttentionSpec(),))
    ]
    return EngineFacts.read(config_of(**changed), SimpleNamespace(kv_cache_groups=groups))


def test_a_plain_engine_passes() -> None:
    facts = facts_of()
    assert (facts.model, facts.shard, facts.alignment_tokens) == ("LlamaForCausalLM", Shard(0, 1), 16)
    spec = facts.spec(ConnectorConfig.parse({"weights": "w"}))
    assert spec.numerics == tuple(sorted(facts.numerics.items()))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, UnsupportedModelError, "pipeline_parallel_size is 2"),
        ({"parallel_config__decode_context_parallel_size": 2}, UnsupportedModelError, "decode_context_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, UnsupportedModelError, "prefill_context_parallel_size"),
        ({"speculative_config": object()}, UnsupportedModelError, "speculative decoding is on"),
        ({"kv_transfer_config__kv_load_failure_policy": "fail"}, ConfigError, "Set it to 'recompute'"),
    ],
)
def test_what_cannot_be_mapped_is_refused_at_the_start(
    changed: dict[str, Any], error: type[KVStoreError], message: str
) -> None:
    with pytest.raises(error) as caught:
        facts_of(**changed)
    assert message in str(caught.value)


LAYERED = ConnectorConfig.parse({"weights": "w", "load": "layered"})


@pytest.mark.parametrize(
    ("specs", "changed", "settings", "message"),
    [
        (
            (SlidingWindowSpec(),),
            {},
            {"load": "layered"},
            "the model has sliding windows (layer 'model.layers.0.attn')",
        ),
        ((FullAttentionSpec(), SlidingWindowSpec()), {}, {"load": "layered"}, "sliding windows"),
        ((FullAttentionSpec(), FullAttentionSpec()), {}, {"load": "layered"}, "has 2 cache groups"),
        ((), {"scheduler_config__async_scheduling": True}, {"load": "layered"}, "--no-async-scheduling"),
        ((), {"parallel_config__use_ubatching": True}, {"load": "layered"}, "microbatches"),
        ((), {"parallel_config__use_ubatching": True}, {"saves_by_layer": True}, "microbatches"),
    ],
)
def test_what_layers_cannot_do_is_refused_at_the_start(
    specs: tuple[Any, ...], changed: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    facts = facts_of(*specs, **changed)
    facts.check(ConnectorConfig.parse({"weights": "w"}))
    with pytest.raises(ConfigError) as caught:
        facts.check(ConnectorConfig.parse({"weights": "w", **settings}))
    assert message in str(caught.value)


def test_layers_of_one_group_of_attention() -> None:
    facts_of().check(LAYERED)
    asynchronous = facts_of(SlidingWindowSpec(), scheduler_config__async_scheduling=True)
    asynchronous.check(ConnectorConfig.parse({"weights": "w", "saves_by_layer": True}))


@pytest.mark.parametrize(
    ("extra", "needs"),
    [({}, False), ({"load": "beside", "saves_by_layer": False}, False), ({"load": "layered"}, True),
     ({"saves_by_layer": True}, True)],
)  # fmt: skip
def test_hooks_are_asked_for_by_who_needs_them(extra: dict[str, Any], needs: bool) -> None:
    """VLLM leaves them out of its CUDA graphs unless it is told."""
    assert ConnectorConfig.needs_layer_hooks({"weights": "w", **extra}) is needs


def test_what_changes_bytes_changes_the_fingerprint() -> None:
    def fingerprint(model: FakeModel | None = None, **changed: Any) -> bytes:
        config = ConnectorConfig.parse({"weights": "w"})
        return facts_of(model_config=model or FakeModel(), **changed).spec(config).fingerprint

    def long(length: int) -> FakeModel:
        model = FakeModel(rope_parameters={"rope_type": "longrope"})
        model.max_model_len = length
        return model

    half, quantized = FakeModel(), FakeModel()
    half.dtype, quantized.quantization = "torch.float16", "fp8"
    different = [
        fingerprint(),
        fingerprint(FakeModel(rope_parameters={"rope_type": "yarn", "factor": 4})),
        fingerprint(FakeModel(hidden_size=128)),
        fingerprint(half),
        fingerprint(quantized),
        fingerprint(cache_config__cache_dtype="fp8_e5m2"),
        fingerprint(long(4096)),
        fingerprint(long(65536)),
    ]
    assert len(set(different)) == len(different)
    moved = FakeModel(_name_or_path="/elsewhere", transformers_version="9.9")
    assert fingerprint(moved) == fingerprint()


# Hand-over

PEERS = ("tcp://10.0.0.7:7400", "tcp://10.0.1.*")


@pytest.mark.parametrize(
    ("params", "asked"),
    [
        (None, None),
        ({}, None),
        ({"do_remote_prefill": False, "remote_host": "x"}, None),
        ({"do_remote_decode": True}, Target()),
        ({"do_remote_decode": True, "send_to": "tcp://10.0.0.7:7400"}, Target("tcp://10.0.0.7:7400")),
        (answer("tcp://10.0.1.9:1", 5, is_pushed=True), Source("tcp://10.0.1.9:1", 5, True)),
    ],
)
def test_hand_overs_are_read(params: Any, asked: Any) -> None:
    assert read_params(params, PEERS) == asked


@pytest.mark.parametrize(
    "params",
    [
        "text",
        {"do_remote_prefill": True, "kvstore": []},
        answer("tcp://10.0.0.7:74000", 5, is_pushed=False),
        answer("tcp://10.0.2.9:1", 5, is_pushed=False),
        answer("", 5, is_pushed=False),
        answer("tcp://10.0.0.7:7400", 0, is_pushed=False),
        {"do_remote_prefill": True, "kvstore": {"address": "tcp://10.0.0.7:7400", "tokens": True}},
        {"do_remote_decode": True, "send_to": 7},
    ],
)
def test_hand_overs_that_are_none(params: Any) -> None:
    with pytest.raises(TransferError):
        read_params(params, PEERS)


# The store


def settings(tmp_path: Path, **extra: Any) -> ConnectorConfig:
    return ConnectorConfig.parse({"weights": "w", **extra})


def test_an_owner_lets_its_own_process_share(tmp_path: Path) -> None:
    owned = OwnedStore(SPEC, settings(tmp_path, dram="4MiB", listen=["tcp://127.0.0.1:0"]))
    try:
        assert shared(owned.socket) is owned.get()
        assert owned.address.startswith("tcp://127.0.0.1:")
        assert Path(owned.socket).exists()
    finally:
        owned.close()
    assert owned.get() is None
    assert shared(owned.socket) is None
    assert not Path(owned.socket).parent.exists()
    owned.close()


def test_an_owner_forgets_everything(tmp_path: Path) -> None:
    owned = OwnedStore(SPEC, settings(tmp_path, dram="4MiB", ssd=[f"{tmp_path}/ssd:64MiB"]))
    try:
        store = owned.get()
        assert store is not None
        prompts: Sequence[list[int]] = [list(range(21)), [*range(8), 99, 98, 97], list(range(40, 48))]
        for ids in prompts:
            keep(store, ids)
        store.flush(30.0)
        assert [store.match([*ids, 7]).tokens for ids in prompts] == [21, 11, 8]
        with store.read(store.match([*prompts[0], 7])):
            assert owned.clear() is False, "a request is loading it"
        store.flush(30.0)
        assert owned.clear() is True
        assert [store.match([*ids, 7]).tokens for ids in prompts] == [0, 0, 0]
    finally:
        owned.close()


def test_a_store_that_is_not_there_yet_is_found_later(tmp_path: Path) -> None:
    socket = str(tmp_path / "node.sock")
    attached = AttachedStore(SPEC, settings(tmp_path, socket=socket, attach_again_s=0.01))
    try:
        assert attached.get() is None
        assert attached.clear() is False
        with open_store(SPEC, dram="4MiB", socket=socket):
            wait_for_store(attached)
        gone = attached.get()
        assert gone is None or gone.is_closed or not _answers(attached)
        with open_store(SPEC, dram="4MiB", socket=socket):
            wait_for_store(attached)
    finally:
        attached.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "others"}, "weights is 'seed 0' there and 'others' here"),
        ({"block_tokens": 8}, "block_tokens is 4 there and 8 here"),
    ],
)
def test_another_models_store_is_refused_with_what_differs(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    socket = str(tmp_path / "node.sock")
    there = dense(4)
    with open_store(there, dram="4MiB", socket=socket), pytest.raises(SpecError) as refused:
        AttachedStore(replace(there, **change), settings(tmp_path, socket=socket))
    assert said in str(refused.value)
    assert there.fingerprint.hex() in str(refused.value)
    assert "groups" not in str(refused.value)


def _answers(attached: AttachedStore) -> bool:
    store = attached.get()
    if store is None:
        return False
    try:
        return store.match([1, 2, 3]).tokens == 0
    except KVStoreError as error:
        attached.failed(store, error)
        return False


def wait_for_store(attached: AttachedStore) -> None:
    until_s = time.monotonic() + 30.0
    while not _answers(attached):
        assert time.monotonic() < until_s
        time.sleep(0.005)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with socket_folder() as name:
        yield Path(name)


def test_what_a_killed_engine_leaves_is_removed_by_the_next_one(short_folder: Path) -> None:
    folders = {name: short_folder / f"{FOLDER_PREFIX}{name}" for name in ("empty", "killed", "lives", "young")}
    for folder in folders.values():
        folder.mkdir()
    other = short_folder / "another-empty"
    other.mkdir()
    source = (
        "import os, signal, sys\n"
        "from kvstore.store import open_store\n"
        "from kvstore.testing.specs import dense\n"
        "store = open_store(dense(4), dram='1MiB', socket=sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", source, str(folders["killed"] / "store.sock")], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list(folders["killed"].iterdir()), "its socket and its lock"
    later_s = time.time() + 2 * FOLDER_LEFT_S
    with open_store(dense(4), dram="1MiB", socket=str(folders["lives"] / "store.sock")) as store:
        os.utime(folders["young"], (later_s, later_s))
        assert remove_left_folders(short_folder) == 0, "all of them are young"
        assert remove_left_folders(short_folder, now_s=later_s) == 2
        assert not folders["empty"].exists()
        assert not folders["killed"].exists()
        assert folders["young"].exists()
        assert other.exists()
        attach_store(str(folders["lives"] / "store.sock"), spec=store.spec).close()
    assert remove_left_folders(short_folder, now_s=later_s) == 1, "it has closed its store"
