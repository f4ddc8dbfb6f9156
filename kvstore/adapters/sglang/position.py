"""Which share of the cache a process holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvstore.errors import ConfigError


@dataclass(frozen=True)
class Position:
    """One rank among those that hold one model's cache.

    Attributes:
        tp_rank, tp_size: which heads, for pools that are split by heads.
        pp_rank, pp_size: which layers.
        cp_rank, cp_size: which part of each page.
        dp_rank: of ranks that hold caches of different requests in one form: it tells processes apart, not bytes.
        is_replicated: every tensor-parallel rank holds the same bytes of the attention cache (MLA).
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dp_rank: int = 0
    is_replicated: bool = False

    @classmethod
    def of(cls, storage_config: Any) -> Position:
        """From SGLang's `HiCacheStorageConfig`.

        Raises:
            ConfigError: the cache is split in a way that this backend has no keys for.
        """
        if getattr(storage_config, "dcp_size", 1) > 1:
            raise ConfigError(
                "this backend does not store caches split by decode context parallelism; start SGLang without it"
            )
        if getattr(storage_config, "should_split_heads", False):
            raise ConfigError(
                "this backend keys pages by the tensor-parallel size and does not split them by heads; remove "
                "tp_lcm_size from the settings"
            )
        return cls(
            tp_rank=storage_config.tp_rank,
            tp_size=storage_config.tp_size,
            pp_rank=storage_config.pp_rank,
            pp_size=storage_config.pp_size,
            cp_rank=storage_config.attn_cp_rank,
            cp_size=storage_config.attn_cp_size,
            dp_rank=getattr(storage_config, "dp_rank", 0),
            is_replicated=bool(storage_config.is_mla_model),
        )

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.tp_size == self.pp_size == self.cp_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that opens what all share."""
        return self.tp_rank == self.pp_rank == self.cp_rank == self.dp_rank == 0

    @property
    def folder(self) -> str:
        """A name that no other rank of this server has."""
        return f"dp{self.dp_rank}-pp{self.pp_rank}-cp{self.cp_rank}-tp{self.tp_rank}"

    def share(self, *, is_replicated: bool) -> str:
        """What the bytes of a pool depend on; ranks that hold the same have the same."""
        heads = "all" if is_replicated else f"{self.tp_rank}/{self.tp_size}"
        return f"tp {heads} pp {self.pp_rank}/{self.pp_size} cp {self.cp_rank}/{self.cp_size}"
