"""The settings of the connector: vLLM's `kv_connector_extra_config`, checked, as values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kvstore.adapters.settings import check_kinds, check_owner, read_settings
from kvstore.cluster.config import LimitsConfig
from kvstore.cluster.exposure import check_exposure
from kvstore.cluster.kinds import Kind, choice, flag, seconds, several, size, text, whole
from kvstore.errors import ConfigError
from kvstore.limits import (
    BLOCK_TOKENS_MAX,
    BLOCK_TOKENS_MIN,
    NODE_ADDRESSES_MAX,
    NODE_DEADLINE_S_MAX,
    SSD_DIRECTORIES_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK_TOKENS_DEFAULT = 64
DRAM_DEFAULT = "4GiB"
PREPARE_DEADLINE_S_DEFAULT = 10.0
FETCH_DEADLINE_S_DEFAULT = 30.0
ATTACH_AGAIN_S_DEFAULT = 5.0

LOADS = ("beside", "layered")

_ORIGIN = "kv_connector_extra_config"


def _sections(what: str) -> Kind:
    """A table of settings of their own."""

    def parse(value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError
        return dict(value)

    return Kind(what, parse)


_KINDS: dict[str, Kind] = {
    "weights": text("the name of the weights, such as 'sha256:1f0c...'"),
    "model": text("a name", may_be_empty=True),
    "block_tokens": whole(BLOCK_TOKENS_MIN, BLOCK_TOKENS_MAX),
    "socket": text("the path of a store's socket", may_be_empty=True),
    "dram": size(),
    "ssd": several(text("a directory and a size such as /var/cache/kv:200GiB"), SSD_DIRECTORIES_MAX),
    "ssd_write_bytes_per_day": size(),
    "own_socket": text("a path", may_be_empty=True),
    "listen": several(text("an address such as tcp://127.0.0.1:7400"), NODE_ADDRESSES_MAX),
    "trust_network": flag(),
    "limits": _sections("a table of limits such as {'quota': '2GiB'}"),
    "peers": several(text("an address, or the beginning of one and a *"), NODE_ADDRESSES_MAX),
    "address": text("an address such as tcp://10.0.0.7:7400", may_be_empty=True),
    "spec_file": text("a path", may_be_empty=True),
    "saves": flag(),
    "saves_decoded": flag(),
    "saves_by_layer": flag(),
    "load": choice(*LOADS),
    "prepare_deadline_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "fetch_deadline_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "attach_again_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "allow_untested_version": flag(),
}


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """All settings of the connector.

    Attributes:
        weights: names the checkpoint whose cache this is, such as the digest of its files. There is no default: two
            models under one name would read each other's cache.
        model: name of the model's architecture in the store; empty: vLLM's own name for it.
        block_tokens: tokens of the store's blocks. Instances that share have the same.
        spec_file: where the model's spec is written at the start, for `kvstore serve`; empty: nowhere.
        socket: where a process owns the store (`kvstore serve`, or another instance's `own_socket`); empty: this
            instance's scheduler process owns it, by the settings from `dram` to `limits`.
        dram, ssd, ssd_write_bytes_per_day: the owner's memory and directories; see `kvstore.cluster.NodeConfig`.
        own_socket: where the owner lets workers and others attach; empty: at a path of its own making.
        listen: where the owner takes what other instances send, and answers what they fetch.
        trust_network: listen beyond loopback, although nothing is encrypted or authenticated.
        limits: quotas and lives; see `kvstore.cluster.config.LimitsConfig`.
        peers: instances that hand-overs may come from and go to: addresses, or beginnings of such and a `*`. What a
            request says about other instances comes from outside, so nobody else is asked, or sent anything.
        address: where other instances fetch from the store, if that is not what it listens on.
        saves: whether this instance saves at all.
        saves_decoded: save what is decoded, too, at block boundaries.
        saves_by_layer: copy each layer while the forward goes on, instead of all of them behind it. CUDA graphs are
            then piecewise.
        load: `beside` the steps of other requests; or `layered`, within the step that computes on from there. This is
            for models of one group of full attention, without asynchronous scheduling; CUDA graphs are then piecewise.
        prepare_deadline_s: how long a request waits for what lies on disk before it is computed.
        fetch_deadline_s: how long a request waits for another instance before it is computed.
        attach_again_s: how often a store that is gone is looked for.
        allow_untested_version: run with a vLLM that this adapter was not tested with. Its interfaces change with
            every release: what no longer fits may fail later, or load wrong bytes.

    Raises:
        ConfigError: a value is of another kind, or two contradict each other.
    """

    weights: str
    model: str = ""
    block_tokens: int = BLOCK_TOKENS_DEFAULT
    spec_file: str = ""
    socket: str = ""
    dram: int | str = DRAM_DEFAULT
    ssd: tuple[str, ...] = ()
    ssd_write_bytes_per_day: int | None = None
    own_socket: str = ""
    listen: tuple[str, ...] = ()
    trust_network: bool = False
    limits: dict[str, Any] | None = None
    peers: tuple[str, ...] = ()
    address: str = ""
    saves: bool = True
    saves_decoded: bool = False
    saves_by_layer: bool = False
    load: str = "beside"
    prepare_deadline_s: float = PREPARE_DEADLINE_S_DEFAULT
    fetch_deadline_s: float = FETCH_DEADLINE_S_DEFAULT
    attach_again_s: float = ATTACH_AGAIN_S_DEFAULT
    allow_untested_version: bool = False

    def __post_init__(self) -> None:
        check_kinds(self, _KINDS, _ORIGIN)
        check_owner(self, _OF_AN_OWNER, _KINDS, _ORIGIN)
        check_exposure(self.listen, "", trust_network=self.trust_network)
        self.limits_config()

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Settings as vLLM passes them on.

        Raises:
            ConfigError: an unknown key, a missing one, or as the constructor.
        """
        return read_settings(cls, extra, _ORIGIN, "{'weights': 'sha256:1f0c...'}")

    @property
    def loads_by_layer(self) -> bool:
        """Whether loads go with the step that computes on from them."""
        return self.load == "layered"

    @staticmethod
    def needs_layer_hooks(extra: Mapping[str, Any]) -> bool:
        """Whether these settings have something done before or behind each layer's forward."""
        return bool(extra.get("saves_by_layer", False)) or extra.get("load") == "layered"

    @property
    def is_owner(self) -> bool:
        """Whether the scheduler's process opens the store itself."""
        return not self.socket

    def limits_config(self) -> LimitsConfig:
        """The owner's limits.

        Raises:
            ConfigError: a key is unknown, or a value of another kind.
        """
        known = [each.name for each in fields(LimitsConfig)]
        unknown = sorted(set(self.limits or {}) - set(known))
        if unknown:
            raise ConfigError(f"{_ORIGIN}: limits has {', '.join(unknown)}; known are {', '.join(known)}")
        return LimitsConfig(**(self.limits or {}))


_OF_AN_OWNER = ("dram", "ssd", "ssd_write_bytes_per_day", "own_socket", "listen", "limits")
