"""Settings and versions: what is wrong is refused at the start, by name."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore.adapters.sglang.__main__ import main as spec_file
from kvstore.adapters.sglang.config import BackendConfig
from kvstore.adapters.sglang.position import Position
from kvstore.adapters.sglang.versions import TESTED, check_version
from kvstore.errors import ConfigError, SpecError, UnavailableError
from kvstore.spec import load_spec
from kvstore.testing import specs
from tests.unit.sglang_pools import LogicalHostPool, MHATokenToKVPoolHost, hashes, make_storage, slots_of

if TYPE_CHECKING:
    from pathlib import Path


def test_what_sglang_reads_itself_may_stand_there() -> None:
    config = BackendConfig.parse(
        {
            "backend_name": "kvstore",
            "module_path": "kvstore.adapters.sglang",
            "class_name": "KVStoreHiCache",
            "interface_v1": 1,
            "weights": "sha256:1f0c",
            "dram": "8GiB",
            "ssd": ["/var/cache/kv:200GiB"],
        }
    )
    assert (config.weights, config.dram, config.verify) == ("sha256:1f0c", 8 << 30, True)


@pytest.mark.parametrize("given", [{}, None])
def test_the_weights_have_no_default(given: dict[str, Any] | None) -> None:
    with pytest.raises(ConfigError, match="no weights"):
        BackendConfig.parse(given)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"weigths": "x"}, "weigths"),
        ({"weights": ""}, "weights"),
        ({"weights": 7}, "weights"),
        ({"dram": "much"}, "dram"),
        ({"verify": 1}, "verify"),
        ({"call_deadline_s": -1}, "call_deadline_s"),
        ({"call_deadline_s": float("nan")}, "call_deadline_s"),
        ({"ssd": "/a:1GiB"}, "ssd"),
        ({"socket": "/s", "dram": "1GiB"}, "dram cannot be set"),
        ({"socket": "/s", "own_socket": "/t"}, "own_socket cannot be set"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        BackendConfig.parse({"weights": "x", **settings})


@pytest.mark.parametrize("found", [*TESTED, TESTED[-1] + ".post1", TESTED[-1] + "+cpu", TESTED[-1] + ".post2+cu13"])
def test_tested_versions_run(found: str) -> None:
    assert check_version(found, allow_untested=False) == found


@pytest.mark.parametrize("found", ["0.5.22", "0.5.230", "0.5.23rc1", "0.6.0", "1.5.23"])
def test_other_versions_run_if_told_to(found: str) -> None:
    with pytest.raises(UnavailableError, match="allow_untested_version"):
        check_version(found, allow_untested=False)
    assert check_version(found, allow_untested=True) == found


def config_of(**changes: Any) -> SimpleNamespace:
    known = {
        "tp_rank": 1, "tp_size": 4, "pp_rank": 2, "pp_size": 3, "attn_cp_rank": 4, "attn_cp_size": 5, "dp_rank": 6,
        "is_mla_model": False, "dcp_size": 1, "should_split_heads": False,
    }  # fmt: skip
    return SimpleNamespace(**{**known, **changes})


def test_a_position_is_that_of_sglang() -> None:
    assert Position.of(config_of()) == Position(1, 4, 2, 3, 4, 5, 6, False)
    assert Position.of(config_of(is_mla_model=True)).is_replicated


@pytest.mark.parametrize("changes", [{"dcp_size": 2}, {"should_split_heads": True}])
def test_a_split_that_has_no_keys_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Position.of(config_of(**changes))


def test_positions_that_hold_other_bytes_have_other_shares() -> None:
    positions = [
        Position(tp, 2, pp, 2, cp, 2, is_replicated=False) for tp in range(2) for pp in range(2) for cp in range(2)
    ]
    assert len({each.share(is_replicated=False) for each in positions}) == 8
    assert len({each.share(is_replicated=True) for each in positions}) == 4
    # Ranks of different requests hold the same bytes for the same pages, and have folders of their own.
    assert Position(dp_rank=1).share(is_replicated=False) == Position().share(is_replicated=False)
    assert Position(dp_rank=1).folder != Position().folder


def test_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="set model"):
        make_storage(("kv", MHATokenToKVPoolHost()), model="")


def test_a_store_needs_pools_with_pages() -> None:
    with pytest.raises(ConfigError, match="no host pool"):
        make_storage()
    with pytest.raises(ConfigError, match="no host pool"):
        make_storage(("kv", LogicalHostPool()))


class PageInterleaveHostPool(MHATokenToKVPoolHost):
    pass


def test_pools_that_hold_something_else_are_refused() -> None:
    envelope = MHATokenToKVPoolHost()
    envelope.stores_page_envelope = True  # type: ignore[attr-defined]
    for pool in (envelope, PageInterleaveHostPool()):
        with pytest.raises(ConfigError, match="cannot store"):
            make_storage(("kv", pool))


class PoolWithoutAddresses(MHATokenToKVPoolHost):
    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        raise ValueError("Unsupported layout: page_first")


def test_an_anchor_without_addresses_needs_the_other_interface() -> None:
    with pytest.raises(ConfigError, match="interface_v1"):
        make_storage(("kv", PoolWithoutAddresses()))
    make_storage(("kv", PoolWithoutAddresses()), is_zero_copy=False).close()


def test_a_spec_file_for_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that knows nothing of SGLang holds its pages."""
    arguments = ["--model", "tiny", "--weights", "random"]
    assert spec_file([*arguments, "--page-bytes", "0"]) == 2
    assert "error" in capsys.readouterr().err
    assert spec_file([*arguments, "--page-bytes", "3072", "--page-bytes", "1024"]) == 0
    path = tmp_path / "spec.json"
    path.write_text(capsys.readouterr().out)
    pool, socket = MHATokenToKVPoolHost(), str(tmp_path / "s")
    with (
        kvstore.open(load_spec(path), dram="8MiB", socket=socket),
        closing(make_storage(("kv", pool), socket=socket)) as one,
        closing(make_storage(("kv", pool), socket=socket)) as other,
    ):
        assert one.write("kv", hashes(2), slots_of([0, 1])) == [True, True]
        assert other.count_prefix(hashes(2)) == 2


def test_a_store_of_something_else_is_not_attached_to(tmp_path: Path) -> None:
    socket = str(tmp_path / "s")
    with (
        kvstore.open(specs.dense(), dram="8MiB", socket=socket),
        pytest.raises(SpecError, match="another socket"),
    ):
        make_storage(("kv", MHATokenToKVPoolHost()), socket=socket)
