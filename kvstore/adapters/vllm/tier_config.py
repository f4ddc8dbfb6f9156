"""The settings of the secondary tier: what stands beside `type` and `module_path` in `secondary_tiers`, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.adapters.settings import check_kinds, read_settings
from kvstore.cluster.kinds import Kind, flag, seconds, several, shown, size, text, whole
from kvstore.errors import ConfigError
from kvstore.limits import FOREIGN_CHUNK_BYTES_MAX, NODE_DEADLINE_S_MAX, SSD_DIRECTORIES_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

_ORIGIN = "secondary_tiers"
_THREADS_MAX = 64

_KINDS: dict[str, Kind] = {
    "weights": text("the name of the weights, such as 'sha256:1f0c...'"),
    "model": text("a name", may_be_empty=True),
    "hash_algorithm": text("the name of a hash, such as 'sha256'"),
    "socket": text("the path of a store's socket", may_be_empty=True),
    "dram": size(),
    "ssd": several(text("a directory and a size such as /var/cache/kv:200GiB"), SSD_DIRECTORIES_MAX),
    "own_socket": text("a path", may_be_empty=True),
    "chunk_bytes": whole(0, FOREIGN_CHUNK_BYTES_MAX),
    "verify": flag(),
    "threads": whole(1, _THREADS_MAX),
    "load_deadline_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "attach_again_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "allow_untested_version": flag(),
}


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """All settings of the tier.

    Attributes:
        weights: names the checkpoint whose cache this is, such as the digest of its files. There is no default: two
            models under one name would read each other's cache.
        model: name of the model in the store; empty: vLLM's own name for it.
        hash_algorithm: vLLM's `prefix_caching_hash_algo`; one that is not cryptographic is refused.
        socket: where a process owns the store; empty: this one opens it, by the settings from `dram` to `own_socket`.
        dram, ssd: the store's memory and directories.
        own_socket: where others may attach to it.
        chunk_bytes: see `ForeignNamespace`; engines that share a store have the same. 0: what suits the rows.
        verify: check the checksums of rows that lie in memory, too, when they are loaded.
        threads: that store, and as many that load.
        load_deadline_s: how long a load may take before its rows are computed instead.
        attach_again_s: how often a store that is gone is looked for.
        allow_untested_version: run with a vLLM that this adapter was not tested with.

    Raises:
        ConfigError: a value is of another kind, or two contradict each other.
    """

    weights: str
    model: str = ""
    hash_algorithm: str = "sha256"
    socket: str = ""
    dram: int | str = "4GiB"
    ssd: tuple[str, ...] = ()
    own_socket: str = ""
    chunk_bytes: int = 0
    verify: bool = True
    threads: int = 2
    load_deadline_s: float = 10.0
    attach_again_s: float = 5.0
    allow_untested_version: bool = False

    def __post_init__(self) -> None:
        check_kinds(self, _KINDS, _ORIGIN)
        if self.socket and (self.ssd or self.own_socket):
            raise ConfigError(
                f"{_ORIGIN}: socket = {shown(self.socket)} is another process's store, so ssd and own_socket cannot be "
                "set here; set them where that store is opened, or leave the socket out"
            )

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> TierConfig:
        """Settings as vLLM passes them on.

        Raises:
            ConfigError: an unknown key, a missing one, or as the constructor.
        """
        return read_settings(cls, settings, _ORIGIN, "{'weights': 'sha256:1f0c...'}")
