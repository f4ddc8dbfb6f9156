"""A node's configuration: what is written holds, all else is refused with file, key, limit and remedy."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.abc import TransportOptions
from kvstore.cli.serve import parse_assignment
from kvstore.cluster import AttachConfig, HttpConfig, LogConfig, NodeConfig, TransportConfig, read_config
from kvstore.cluster.config import SETTINGS, LimitsConfig
from kvstore.cluster.exposure import is_loopback
from kvstore.errors import ConfigError
from kvstore.limits import GIB, MIB, NODE_CONFIG_BYTES_MAX
from kvstore.pool import StoreLimits
from kvstore.testing.specs import hybrid
from kvstore.transfer import TransferSettings

REFERENCE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
EVERYTHING = """
spec = "model.json"
dram = "2GiB"
listen = ["tcp://0.0.0.0:7400", "tcp://[::1]:7400"]
trust_network = true
serves = false
drain_s = 3
[attach]
socket = "/run/kvstore/a.sock"
arena = "pool"
allow_uids = [1000, 1001]
silence_s = 2.5
verify = true
[http]
listen = ""
[log]
format = "json"
level = "debug"
[transport]
congestion_control = "cubic"
pacing_bytes_per_s = "100MB"
[transfer]
progress_deadline_s = 2
credit_bytes = "32MiB"
connections = 4
transfers_per_node_max = 9
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = read_config(None, {"spec": "model.json"})
    assert config == NodeConfig(spec="model.json")
    assert (config.dram, config.listen, config.trust_network) == (GIB, ("tcp://127.0.0.1:7400",), False)
    assert config.transfer == TransferSettings()
    assert config.serves
    assert config.transport.options() == TransportOptions()


def test_everything_from_a_file(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, EVERYTHING))
    assert config == NodeConfig(
        spec="model.json",
        dram=2 * GIB,
        listen=("tcp://0.0.0.0:7400", "tcp://[::1]:7400"),
        serves=False,
        trust_network=True,
        drain_s=3.0,
        attach=AttachConfig("/run/kvstore/a.sock", "pool", (1000, 1001), 2.5, True),
        http=HttpConfig(""),
        log=LogConfig("json", "debug"),
        transport=TransportConfig("cubic", 100_000_000),
        transfer=TransferSettings(
            progress_deadline_s=2.0, credit_bytes=32 * MIB, connections=4, transfers_per_node_max=9
        ),
    )


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    given_flags = {"dram": "1MiB", "listen": ["tcp://127.0.0.1:0"], "transfer.connections": 1, "trust_network": False}
    config = read_config(write(tmp_path, EVERYTHING), given_flags)
    assert (config.dram, config.listen, config.transfer.connections) == (MIB, ("tcp://127.0.0.1:0",), 1)
    assert config.transfer.credit_bytes == 32 * MIB


def test_values_in_python_are_checked_too() -> None:
    assert NodeConfig(spec=hybrid(), dram="8MiB", listen=["tcp://127.0.0.1:0"]).dram == 8 * MIB  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="drain_s = nan is not a number of seconds"):
        NodeConfig(spec="x", drain_s=float("nan"))
    with pytest.raises(ConfigError, match="log=5 is no LogConfig"):
        NodeConfig(spec="x", log=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"transfer.connections_per_node_max = 100000 is not a whole number"):
        NodeConfig(spec="x", transfer=TransferSettings(connections_per_node_max=100_000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dram = ", "is not a TOML file"),
        ("dram = 1\ndram = 2", "is not a TOML file"),
        ("", "has no `spec`; make one with `kvstore spec`"),
        ("spec = 5", "spec = 5 is not the path of a spec file"),
        ('spec = ""', "is not the path"),
        ('spec = "a\\u0000b"', "is not the path"),
        ('dram = "8 gibi"', "dram = '8 gibi' is not a size from 1"),
        ("dram = 1.5", "dram = 1.5 is not a size"),
        ("dram = true", "dram = True is not a size"),
        ("dram = 0", "dram = 0 is not a size"),
        (f"dram = {10**30}", "is not a size"),
        ('dram = "1e400"', "is not a size"),
        ('listen = "tcp://127.0.0.1:7400"', "listen = .* is not a list of 1 to 16 different entries"),
        ("listen = []", "is not a list of 1 to 16"),
        ('listen = ["tcp://127.0.0.1:1", "tcp://127.0.0.1:1"]', "different entries"),
        ("drain_s = -1", "from 0 to 3600"),
        ("drain_s = nan", "from 0 to 3600"),
        ("drain_s = inf", "from 0 to 3600"),
        ("drain_s = true", "from 0 to 3600"),
        ("trust_network = 1", "trust_network = 1 is not true or false"),
        ("dran = 5", "there is no setting 'dran'; did you mean dram?"),
        ("[transfer]\ncredit = 5", "no setting 'transfer.credit'; did you mean transfer.credit_bytes?"),
        ("[transfer]\nconnections = 65", "transfer.connections = 65 is not a whole number from 1 to 64"),
        ("[transfer]\nprogress_deadline_s = 0.0", "from 0.1 to 3600"),
        ("serves = 'yes'", "serves = 'yes' is not true or false"),
        ("[transport]\npacing_bytes_per_s = 1023", "is not a size from 1024"),
        ("[transport]\ncongestion_control = ''", "is not a name of 1 to 15 letters"),
        ("[attach]\narena = 'a/b'\nsocket = 'x'", "attach.arena = 'a/b' is not a name of 1 to 128 letters"),
        ("[transport]\nlocal_addresses = []", "there is no setting 'transport.local_addresses'"),
        ("[log]\nformat = 'xml'", "log.format = 'xml' is not one of text, json"),
        ("log = 5", r"log is a table; write \[log\]"),
        ("[dram]\nx = 1", "dram = {'x': 1} is not a size"),
        ("[nothing]\nx = 1", "there is no setting 'nothing'; known are spec, dram"),
        ("[tls]\ncertificate = 'x'", "tls is not there yet: this version neither encrypts nor authenticates"),
        ("[attach]\nverify = true", "there is no attach.socket; set it"),
        ("[attach]\nallow_uids = [-1]\nsocket = 'x'", "whole number from 0"),
        ("[limits]\nttl_s = 0", "limits.ttl_s = 0 is not a number of seconds"),
        ("spec = 1979-05-27", "is not the path"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path, {} if "spec" in text or not text else {"spec": "model.json"})
    # What concerns the file names it; what concerns two settings together names both.
    assert str(path) in str(caught.value) or "attach.verify" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="is no path"):
        read_config("a\0b")
    with pytest.raises(ConfigError, match=r"larger than 1\.00 MiB, the limit of a configuration"):
        read_config(write(tmp_path, "#" * (NODE_CONFIG_BYTES_MAX + 1)))
    with pytest.raises(ConfigError, match="not a TOML file"):
        read_config(write(tmp_path, "a = " + "[" * 100_000))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'spec = "\xff"')
    with pytest.raises(ConfigError, match="not a TOML file"):
        read_config(path)


def test_a_flag_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match="command line: drain_s = 'soon' is not a number of seconds from 0 to 3600"):
        read_config(None, {"spec": "x", "drain_s": "soon"})
    with pytest.raises(ConfigError, match="no spec file is named"):
        read_config(None, {})


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["8GiB", "tcp://127.0.0.1:0", "127.0.0.1:0", "json", 5, 0.5, 1 << 20])
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*SETTINGS, "tls", "attach", "x.y", ""]), VALUES, max_size=5))
def test_any_value_is_used_or_refused(values: dict[str, Any]) -> None:
    try:
        config = read_config(None, {"spec": "model.json", **values})
    except ConfigError:
        return
    again = {"spec": config.spec, "dram": config.dram, "listen": config.listen, "trust_network": config.trust_network}
    again |= {f"transfer.{each.name}": getattr(config.transfer, each.name) for each in fields(TransferSettings)}
    again |= {f"attach.{each.name}": getattr(config.attach, each.name) for each in fields(AttachConfig)}
    again |= {f"transport.{each.name}": getattr(config.transport, each.name) for each in fields(TransportConfig)}
    again |= {"serves": config.serves}
    again |= {"http.listen": config.http.listen, "drain_s": config.drain_s}
    again |= {"log.format": config.log.format, "log.level": config.log.level}
    assert read_config(None, {key: value for key, value in again.items() if value is not None}) == config


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_file_is_used_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("transfer.credit_bytes=32MiB", ("transfer.credit_bytes", "32MiB")),
        ("drain_s=2.5", ("drain_s", 2.5)),
        ("trust_network=true", ("trust_network", True)),
        ('listen=["a", "b"]', ("listen", ["a", "b"])),
        ("attach.socket=/run/a=b.sock", ("attach.socket", "/run/a=b.sock")),
        ("log.level='debug'", ("log.level", "debug")),
        ("a=1\nb=2", ("a", "1\nb=2")),
        ("a=", ("a", "")),
    ],
)
def test_assignments(text: str, expected: tuple[str, object]) -> None:
    assert parse_assignment(text) == expected


def test_no_assignment() -> None:
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_assignment("drain_s")


# Exposure


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.0.0.1:7400", True),
        ("tcp://127.9.9.9:0", True),
        ("tcp://[::1]:7400", True),
        ("tcp://localhost:7400", True),
        ("tcp://127.0.0.1:7400,[::1]:7400,localhost:0", True),
        ("tcp://127.0.0.1:7400,10.0.0.2:7400", False),
        ("tcp://127.0.0.1:7400,0.0.0.0:0", False),
        ("tcp://127.0.0.1:7400,", False),
        ("memory://anything", True),
        ("http://127.0.0.1:80", True),
        ("tcp://0.0.0.0:7400", False),
        ("tcp://[::]:7400", False),
        ("tcp://10.0.0.2:7400", False),
        ("tcp://node-3:7400", False),
        ("tcp://localhost.example:7400", False),
        ("tcp://127.0.0.1@10.0.0.2:7400", False),
        ("tcp://[::ffff:10.0.0.2]:1", False),
        ("tcp://[bad:7400", False),
        ("127.0.0.1:7400", False),
        ("", False),
    ],
)
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_addresses_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"'127.0.0.1:7400' names no transport; write tcp://127.0.0.1:7400"):
        read_config(None, {"spec": "x", "listen": ["127.0.0.1:7400"]})
    for wrong in ("nonsense", "http://127.0.0.1:80", "127.0.0.1", "127.0.0.1:65536"):
        with pytest.raises(ConfigError, match=rf"http.listen = '{wrong}' is not host:port"):
            read_config(None, {"spec": "x", "http.listen": wrong, "trust_network": True})


def test_beyond_loopback_only_in_plain_words() -> None:
    with pytest.raises(ConfigError, match=r"whoever can reach the port can read and write the cache.*--trust-network"):
        read_config(None, {"spec": "x", "listen": ["tcp://127.0.0.1:0", "tcp://0.0.0.0:7400"]})
    with pytest.raises(ConfigError, match=r"http.listen = 0.0.0.0:80 is not a loopback address.*trust_network = true"):
        read_config(None, {"spec": "x", "http.listen": "0.0.0.0:80"})
    trusting = {"spec": "x", "trust_network": True, "listen": ["tcp://0.0.0.0:7400"], "http.listen": "0.0.0.0:80"}
    assert read_config(None, trusting).listen == ("tcp://0.0.0.0:7400",)


# The reference


def test_the_reference_lists_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| (none|`[^`]*`) \|", REFERENCE, re.M)
    documented = {key: cell.strip("`") for key, cell in rows}
    assert list(documented) == list(SETTINGS)
    for key, cell in documented.items():
        setting = SETTINGS[key]
        if cell == "none":
            assert setting.default in (None, MISSING)
        else:
            assert setting.kind.parse(tomllib.loads(f"value = {cell}")["value"]) == setting.default, key


def test_every_setting_of_transfers_can_be_set() -> None:
    """A new one needs a kind in `kvstore.cluster.config`, and a row in the reference."""
    assert {f"transfer.{each.name}" for each in fields(TransferSettings)} <= set(SETTINGS)


def test_limits_become_those_of_a_store() -> None:
    limits = LimitsConfig(
        quota="2GiB",
        quotas=("tenant-7:1GiB", "a:b:none"),
        shelf_quota="9GiB",
        ttl_s=60,
        lease_max_s=10,  # type: ignore[arg-type]
    ).store_limits()
    assert limits.quota == 2 << 30
    assert limits.quotas == {b"tenant-7": 1 << 30, b"a:b": None}
    assert limits.of_shelves().quota == 9 << 30
    assert (limits.ttl_s, limits.lease_max_s, limits.writer_max_s) == (60, 10, None)
    assert LimitsConfig().store_limits() == StoreLimits()


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        (["tenant-7"], "limits.quotas: it has 'tenant-7'; give each salt once, with a size"),
        (["a:1GiB", "a:2GiB"], "limits.quotas: it has 'a:2GiB'"),
        (["a:lots"], "limits.quotas: the quota of salt b'a' is no size"),
    ],
)
def test_quotas_that_are_none(quotas: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LimitsConfig(quotas=tuple(quotas))
