"""What a node's operator sets, as values that are sound once they exist."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from kvstore.abc import TransportOptions
from kvstore.cluster.exposure import check_exposure
from kvstore.cluster.kinds import Kind, choice, flag, parse_as, plain_name, seconds, several, shown, size, text, whole
from kvstore.errors import ConfigError
from kvstore.limits import (
    ARENA_NAME_CHARACTERS_MAX,
    ATTACHED_PROCESSES_MAX,
    ATTACHED_SILENCE_S,
    CONNECTIONS_PER_TRANSFER_MAX,
    GIB,
    KIB,
    LIFE_S_MAX,
    NODE_ADDRESSES_MAX,
    NODE_COUNT_MAX,
    NODE_DEADLINE_S_MAX,
    NODE_DRAIN_S_MAX,
    NODE_LIFE_S_MAX,
    NODE_QUOTAS_MAX,
    RECORD_BYTES_MAX,
    SSD_DIRECTORIES_MAX,
)
from kvstore.placement.ssd import SsdOptions
from kvstore.pool import StoreLimits
from kvstore.spec import ModelSpec
from kvstore.transfer import TransferSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

LISTEN_DEFAULT = "tcp://127.0.0.1:7400"
HTTP_LISTEN_DEFAULT = "127.0.0.1:7401"
DRAIN_S_DEFAULT = 25.0
"""Below the 30 s that Kubernetes gives a pod before it kills it."""
CONGESTION_NAME_CHARACTERS_MAX = 15
"""`TCP_CA_NAME_MAX` of `linux/tcp.h`, without the byte that ends it."""
LEVELS = ("debug", "info", "warning", "error")


def _spec_or_path(value: object) -> object:
    return value if isinstance(value, ModelSpec) else text("").parse(value)


def _parse_fields(config: Any, section: str) -> None:
    """Make every value of a section one of its kind."""
    for each in fields(config):
        kind = each.metadata.get("kind")
        value = getattr(config, each.name)
        if kind is not None and not (value is None and each.default is None):
            object.__setattr__(config, each.name, parse_as(kind, section + each.name, value, "the configuration"))


@dataclass(frozen=True)
class AttachConfig:
    """Processes of this host that share the node's pool; see `kvstore.open`.

    Attributes:
        socket: path of the Unix socket at which they attach; None: none may.
        arena: name of the shared memory in `/dev/shm`; None: it has none.
        allow_uids: users that may attach besides the node's own and root.
        silence_s: one that is silent for longer loses its leases and writers.
        verify: recompute the checksum of every piece that they wrote.
    """

    socket: str | None = field(default=None, metadata={"kind": text("a path")})
    arena: str | None = field(default=None, metadata={"kind": plain_name(ARENA_NAME_CHARACTERS_MAX)})
    allow_uids: tuple[int, ...] = field(
        default=(), metadata={"kind": several(whole(0, (1 << 32) - 2), ATTACHED_PROCESSES_MAX)}
    )
    silence_s: float = field(default=ATTACHED_SILENCE_S, metadata={"kind": seconds(0.1, NODE_DEADLINE_S_MAX)})
    verify: bool = field(default=False, metadata={"kind": flag()})

    def __post_init__(self) -> None:
        _parse_fields(self, "attach.")
        is_told = bool(self.allow_uids) or self.silence_s != ATTACHED_SILENCE_S or self.verify
        if self.socket is None and is_told:
            raise ConfigError(
                "attach.allow_uids, attach.silence_s and attach.verify are about processes that attach, and there is "
                "no attach.socket; set it, or leave them out"
            )


@dataclass(frozen=True)
class HttpConfig:
    """Health, metrics and status.

    Attributes:
        listen: `host:port`, a numeric host or `localhost`; empty: no HTTP.
    """

    listen: str = field(
        default=HTTP_LISTEN_DEFAULT, metadata={"kind": text("host:port, or empty for none", may_be_empty=True)}
    )

    def __post_init__(self) -> None:
        _parse_fields(self, "http.")


@dataclass(frozen=True)
class LimitsConfig:
    """What the node bears of each tenant; see `StoreLimits`.

    Attributes:
        quota: bytes of memory that the records of one salt may take; None: no more than there is.
        quotas: other quotas of single salts, each `salt:2GiB`; `salt:none` lifts it.
        shelf_quota: bytes of one salt in the tier on disk.
        ttl_s: time to live of what is written without one of its own.
        lease_max_s, writer_max_s: an engine that has one for longer loses it.
    """

    quota: int | None = field(default=None, metadata={"kind": size()})
    quotas: tuple[str, ...] = field(
        default=(), metadata={"kind": several(text("a salt and a size such as tenant-7:2GiB"), NODE_QUOTAS_MAX)}
    )
    shelf_quota: int | None = field(default=None, metadata={"kind": size()})
    ttl_s: float | None = field(default=None, metadata={"kind": seconds(0.001, LIFE_S_MAX)})
    lease_max_s: float | None = field(default=None, metadata={"kind": seconds(0.001, NODE_LIFE_S_MAX)})
    writer_max_s: float | None = field(default=None, metadata={"kind": seconds(0.001, NODE_LIFE_S_MAX)})

    def __post_init__(self) -> None:
        _parse_fields(self, "limits.")
        try:
            self.store_limits()
        except ConfigError as error:
            raise ConfigError(f"limits.quotas: {error}") from error

    def store_limits(self) -> StoreLimits:
        """As `kvstore.open` takes them.

        Raises:
            ConfigError: a quota names no salt or no size, or two name one salt.
        """
        quotas: dict[bytes, str | None] = {}
        for each in self.quotas:
            salt, colon, amount = each.rpartition(":")
            if not colon or salt.encode() in quotas:
                raise ConfigError(f"it has {each!r}; give each salt once, with a size, such as 'tenant-7:2GiB'")
            quotas[salt.encode()] = None if amount == "none" else amount
        return StoreLimits(
            quota=self.quota,
            quotas=quotas,
            shelf_quota=self.shelf_quota,
            ttl_s=self.ttl_s,
            lease_max_s=self.lease_max_s,
            writer_max_s=self.writer_max_s,
        )


@dataclass(frozen=True)
class LogConfig:
    """What is written to standard error, one line per event.

    Attributes:
        format: `text`, or `json` with one object per line.
        level: the least that is written.
    """

    format: str = field(default="text", metadata={"kind": choice("text", "json")})
    level: str = field(default="info", metadata={"kind": choice(*LEVELS)})

    def __post_init__(self) -> None:
        _parse_fields(self, "log.")


@dataclass(frozen=True)
class TransportConfig:
    """How the node's own side of each connection that peers open sends: what they fetch.

    Attributes:
        congestion_control: name of the algorithm; None leaves it to what is measured of the path.
        pacing_bytes_per_s: the most that one connection sends; None is unpaced.
    """

    congestion_control: str | None = field(default=None, metadata={"kind": plain_name(CONGESTION_NAME_CHARACTERS_MAX)})
    pacing_bytes_per_s: int | None = field(default=None, metadata={"kind": size(KIB)})

    def __post_init__(self) -> None:
        _parse_fields(self, "transport.")

    def options(self) -> TransportOptions:
        """As a transport takes them."""
        return TransportOptions(self.pacing_bytes_per_s, self.congestion_control)


@dataclass(frozen=True)
class NodeConfig:
    """All settings of a node.

    Attributes:
        spec: path of the spec file of the model whose cache the node keeps; in Python also a `ModelSpec`.
        dram: bytes of host memory for records, headers and index, allocated at the start.
        ssd: directories of a tier on disk, each `/dir:200GiB`, one for each drive; empty: there is none.
        ssd_write_bytes_per_day: the most that is written to it in 24 hours; None for no limit.
        listen: addresses at which other nodes connect. The limits of `transfer` hold for each.
        serves: peers may ask what the pool holds, and fetch it.
        trust_network: listen beyond loopback although nothing is encrypted or authenticated.
        drain_s: how long transfers may go on after SIGTERM.
        attach, limits, http, log, transport: see there.
        transfer: deadlines and limits of transfers.

    Raises:
        ConfigError: a value is of another kind, or an address is not loopback and `trust_network` is not set.
    """

    spec: str | ModelSpec = field(metadata={"kind": Kind("the path of a spec file", _spec_or_path)})
    dram: int = field(default=1 * GIB, metadata={"kind": size()})
    ssd: tuple[str, ...] = field(
        default=(),
        metadata={"kind": several(text("a directory and a size such as /var/cache/kv:200GiB"), SSD_DIRECTORIES_MAX)},
    )
    ssd_write_bytes_per_day: int | None = field(default=None, metadata={"kind": size()})
    listen: tuple[str, ...] = field(
        default=(LISTEN_DEFAULT,),
        metadata={"kind": several(text("an address such as tcp://127.0.0.1:7400"), NODE_ADDRESSES_MAX, least=1)},
    )
    serves: bool = field(default=True, metadata={"kind": flag()})
    trust_network: bool = field(default=False, metadata={"kind": flag()})
    drain_s: float = field(default=DRAIN_S_DEFAULT, metadata={"kind": seconds(0.0, NODE_DRAIN_S_MAX)})
    attach: AttachConfig = field(default_factory=AttachConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    log: LogConfig = field(default_factory=LogConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    transfer: TransferSettings = field(default_factory=TransferSettings)

    def __post_init__(self) -> None:
        _parse_fields(self, "")
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise ConfigError(f"{name}={shown(getattr(self, name))} is no {section.__name__}; pass one")
        for key, setting in SETTINGS.items():
            section_name, _, name = key.partition(".")
            if section_name == "transfer" and (value := getattr(self.transfer, name)) != setting.default:
                parse_as(setting.kind, key, value, "the configuration")
        if self.ssd:
            self.ssd_options()
        elif self.ssd_write_bytes_per_day is not None:
            raise ConfigError("ssd_write_bytes_per_day is about the tier on disk, and there is no ssd; set it, too")
        check_exposure(self.listen, self.http.listen, trust_network=self.trust_network)

    def ssd_options(self) -> SsdOptions | None:
        """As `kvstore.open` takes them; None without a tier on disk."""
        if not self.ssd:
            return None
        return SsdOptions(self.ssd, write_bytes_per_day=self.ssd_write_bytes_per_day)


SECTIONS: dict[str, type] = {
    "attach": AttachConfig,
    "limits": LimitsConfig,
    "http": HttpConfig,
    "log": LogConfig,
    "transport": TransportConfig,
    "transfer": TransferSettings,
}


@dataclass(frozen=True)
class Setting:
    """One key of the configuration.

    Attributes:
        key: as in the file, `section.name` in a table.
        kind: what it may be.
        default: its value where it is not set; `MISSING` if it must be set.
    """

    key: str
    kind: Kind
    default: object


_TRANSFER_KINDS = {
    "progress_deadline_s": seconds(0.1, NODE_DEADLINE_S_MAX),
    "connect_deadline_s": seconds(0.1, NODE_DEADLINE_S_MAX),
    "resume_window_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "queue_deadline_s": seconds(0.001, NODE_DEADLINE_S_MAX),
    "credit_bytes": size(64 * KIB, 1024 * RECORD_BYTES_MAX),
    "connections": whole(1, CONNECTIONS_PER_TRANSFER_MAX),
}
"""Where the bounds of a transfer setting are not those of its type."""


def _transfer_kind(name: str, default: object) -> Kind | None:
    """What a transfer setting may be; None for one that only Python can set."""
    if name in _TRANSFER_KINDS:
        return _TRANSFER_KINDS[name]
    if isinstance(default, bool):
        return flag()
    if not isinstance(default, int | float):
        return None
    if name.endswith(("_bytes", "_bytes_per_s")):
        return size()
    return whole(1, NODE_COUNT_MAX) if isinstance(default, int) else seconds(0.001, NODE_DEADLINE_S_MAX)


def _settings() -> Iterable[Setting]:
    for each in fields(NodeConfig):
        if each.name not in SECTIONS:
            yield Setting(each.name, each.metadata["kind"], each.default)
    for name, section in SECTIONS.items():
        for each in fields(section):
            kind = each.metadata.get("kind") or _transfer_kind(each.name, each.default)
            if kind is not None:
                yield Setting(f"{name}.{each.name}", kind, each.default)


SETTINGS: dict[str, Setting] = {setting.key: setting for setting in _settings()}
"""Every key, in the order of the reference (docs/operations.md)."""
