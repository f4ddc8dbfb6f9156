"""Arguments of a store that are of another type or value than they must be, found before anything is done with them."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING

from kvstore.errors import AttachError, ConfigError, KVStoreError, LeaseError, SpecError, WriteError
from kvstore.limits import CHECKPOINTS_PER_WRITE_MAX, LIFE_S_MAX
from kvstore.pool import Match, StoreLimits
from kvstore.spec import ChunkGrid, Coverage, ModelSpec, Shard
from kvstore.store.lease import Lease

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_spec(spec: ModelSpec) -> None:
    """Raises `SpecError` for anything else than a spec."""
    if not isinstance(spec, ModelSpec):
        raise SpecError(
            f"{spec!r} is no kvstore.ModelSpec; make one with ModelSpec.from_transformers, or by hand as in "
            "docs/model-spec.md"
        )


def check_ttl(ttl_s: float | None, *, may_be_over: bool = False) -> None:
    """Raises `WriteError` for anything else than a time to live in seconds, or None.

    Args:
        may_be_over: 0 is one, too.
    """
    if ttl_s is None:
        return
    is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
    if not is_number or not 0 <= ttl_s <= LIFE_S_MAX or (ttl_s == 0 and not may_be_over):
        least = "from 0 on" if may_be_over else "above 0"
        raise WriteError(
            f"ttl_s={ttl_s!r} is no time to live; give seconds {least}, at most {LIFE_S_MAX:.0f}, or None for no end"
        )


def check_limits(limits: StoreLimits | None) -> None:
    """Raises `ConfigError` for anything else than limits."""
    if not isinstance(limits, StoreLimits | None):
        raise ConfigError(f"limits={limits!r} are no kvstore.StoreLimits; pass StoreLimits(quota='2GiB'), or None")


def check_position(shard: Shard, grid: ChunkGrid | None) -> None:
    """Raises `SpecError` for anything else than a worker's position and the boundaries of its chunks."""
    if not isinstance(shard, Shard):
        raise SpecError(f"shard={shard!r} is no kvstore.Shard; pass Shard(index, count)")
    if not isinstance(grid, ChunkGrid | None):
        raise SpecError(
            f"grid={grid!r} is no kvstore.ChunkGrid; pass ChunkGrid.every(chunk_tokens, upto=len(token_ids)), or None"
        )


def check_coverage(coverage: Coverage | None) -> None:
    """Raises `SpecError` for anything else than a coverage."""
    if not isinstance(coverage, Coverage | None):
        raise SpecError(f"coverage={coverage!r} is no kvstore.Coverage; make one with Coverage.of_masks, or pass None")


def check_match(match: Match) -> None:
    """Raises `LeaseError` for anything else than what `Store.match` gives, and for a miss."""
    if not isinstance(match, Match):
        raise LeaseError(f"a {type(match).__name__} is no match; pass what Store.match returned")
    if not match.candidates:
        raise LeaseError("there is nothing to read: the match is a miss; test `if match:` first")


def check_lease(resume: Lease | None) -> None:
    """Raises `WriteError` for anything else than what `Store.read` gives."""
    if not isinstance(resume, Lease | None):
        raise WriteError(
            f"resume= takes a lease, not a {type(resume).__name__}; pass what Store.read returned, or None"
        )


def lengths_of(resume_at: Sequence[int] | None, prompt_tokens: int) -> tuple[int, ...]:
    """The lengths of a writer's checkpoints, ascending, each once; the prompt's end by default.

    Raises:
        WriteError: not whole numbers, or too many of them.
    """
    if resume_at is None:
        return (prompt_tokens,)
    if isinstance(resume_at, str | bytes):
        raise WriteError(f"resume_at={resume_at!r} is text; pass the lengths as numbers, such as ({prompt_tokens},)")
    try:
        lengths = tuple(sorted({operator.index(length) for length in resume_at}))
    except TypeError as error:
        raise WriteError(
            f"resume_at={resume_at!r} is no sequence of whole numbers; pass the lengths, such as ({prompt_tokens},)"
        ) from error
    if len(lengths) > CHECKPOINTS_PER_WRITE_MAX:
        raise WriteError(
            f"{len(lengths)} checkpoints are more than the limit of {CHECKPOINTS_PER_WRITE_MAX}; store fewer of them"
        )
    return lengths


def socket_path(socket: str | os.PathLike[str]) -> str:
    """The path of a socket as text.

    Raises:
        AttachError: it is no path, or an empty one.
    """
    path = os.fspath(socket) if isinstance(socket, str | os.PathLike) else ""
    if not path:
        raise AttachError(f"socket={socket!r} is no path; pass one such as '/run/kvstore/model.sock'")
    return path


def check_joint(name: str | None) -> None:
    """Raises `WriteError` for anything else than a name."""
    if not isinstance(name, str | None):
        raise WriteError(f"joint={name!r} is no name; pass a str that all parties share, such as 'request-17'")


def check_deadline(deadline_s: float, kind: type[KVStoreError] = AttachError) -> None:
    """Raises `kind` for anything else than a positive number of seconds."""
    if not isinstance(deadline_s, int | float) or not deadline_s > 0:
        raise kind(f"deadline_s={deadline_s!r} is no positive number of seconds; give one, such as 5.0")
