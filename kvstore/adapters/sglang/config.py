"""The backend's settings: SGLang's `--hicache-storage-backend-extra-config`, checked, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.adapters.settings import check_kinds, check_owner, read_settings
from kvstore.adapters.sglang.versions import OVERRIDE
from kvstore.cluster.kinds import Kind, flag, seconds, several, size, text, whole
from kvstore.limits import FOREIGN_CHUNK_BYTES_MAX, NODE_DEADLINE_S_MAX, SSD_DIRECTORIES_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

ORIGIN = "hicache-storage-backend-extra-config"
DRAM_DEFAULT = "4GiB"
CALL_DEADLINE_S_DEFAULT = 5.0
"""Below the 10 s that SGLang gives its storage threads to end."""
START_DEADLINE_S_DEFAULT = 60.0
ATTACH_AGAIN_S_DEFAULT = 5.0

_OF_SGLANG = frozenset({"backend_name", "module_path", "class_name", "interface_v1"})
"""What SGLang reads itself, and leaves in."""

_KINDS: dict[str, Kind] = {
    "weights": text("the name of the weights, such as 'sha256:1f0c...'"),
    "model": text("a name", may_be_empty=True),
    "kv_dtype": text("an element type such as fp8_e4m3", may_be_empty=True),
    "tenant": text("a name", may_be_empty=True),
    "socket": text("the path of a store's socket", may_be_empty=True),
    "own_socket": text("a path", may_be_empty=True),
    "dram": size(),
    "ssd": several(text("a directory and a size such as /var/cache/kv:200GiB"), SSD_DIRECTORIES_MAX),
    "ssd_write_bytes_per_day": size(),
    "chunk_bytes": whole(0, FOREIGN_CHUNK_BYTES_MAX),
    "verify": flag(),
    "call_deadline_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "start_deadline_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "attach_again_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    OVERRIDE: flag(),
}


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """All settings of the backend.

    Attributes:
        weights: names the checkpoint whose cache this is, such as the digest of its files. There is no default: two
            models under one name would read each other's cache.
        model: name of the model; empty: SGLang's own, which is the path that it was started with unless
            `--served-model-name` says another.
        kv_dtype: element type of the cache, where SGLang's pools hold bytes and `--kv-cache-dtype` is `auto`.
        tenant: whose objects these are in the store: for quotas, and kept apart from other tenants'.
        socket: where another process owns the store (`kvstore serve`, or another server's `own_socket`); empty: the
            store is opened here, by the settings from `own_socket` to `chunk_bytes`.
        own_socket: the first rank opens the store and lets the others attach here; empty: each rank opens its own.
        dram, ssd, ssd_write_bytes_per_day: memory and directories of a store that is opened here; see `kvstore.open`.
            Where each rank opens its own, both are per rank, and each takes a folder of its own in a directory.
        chunk_bytes: the store's records; 0: chosen from the sizes of the pages.
        verify: check what lies in memory against its checksums when it is read. What comes from a disk always is.
        call_deadline_s: how long one call of SGLang's may wait for a disk.
        start_deadline_s: how long to wait for the owner of the store at the start.
        attach_again_s: how often a store that is gone is looked for.
        allow_untested_version: run with an SGLang that this adapter was not tested with.

    Raises:
        ConfigError: a value is of another kind, or two contradict each other.
    """

    weights: str
    model: str = ""
    kv_dtype: str = ""
    tenant: str = ""
    socket: str = ""
    own_socket: str = ""
    dram: int | str = DRAM_DEFAULT
    ssd: tuple[str, ...] = ()
    ssd_write_bytes_per_day: int | None = None
    chunk_bytes: int = 0
    verify: bool = True
    call_deadline_s: float = CALL_DEADLINE_S_DEFAULT
    start_deadline_s: float = START_DEADLINE_S_DEFAULT
    attach_again_s: float = ATTACH_AGAIN_S_DEFAULT
    allow_untested_version: bool = False

    def __post_init__(self) -> None:
        check_kinds(self, _KINDS, ORIGIN)
        check_owner(self, _OF_AN_OWNER, _KINDS, ORIGIN)

    @classmethod
    def parse(cls, extra: Mapping[str, Any] | None) -> BackendConfig:
        """Settings as SGLang passes them on.

        Raises:
            ConfigError: an unknown key, a missing one, or as the constructor.
        """
        given = {key: value for key, value in (extra or {}).items() if key not in _OF_SGLANG}
        return read_settings(cls, given, ORIGIN, '"weights": "sha256:1f0c..."')


_OF_AN_OWNER = ("own_socket", "dram", "ssd", "ssd_write_bytes_per_day", "chunk_bytes")
