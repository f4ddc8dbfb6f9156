"""What a request is cached under besides its token ids: salt, adapter, images; and what cannot be cached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError
from kvstore.keys import ExtraInput
from kvstore.limits import SALT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable

LONG_SALT = b"kvstore.salt.sha256\0"
ADAPTER_DOMAIN = b"kvstore.adapter.v1\0"
INPUT_DOMAIN = b"kvstore.input.v1\0"
ADAPTER_SUFFIXES = (".safetensors", ".bin", ".pt", ".json")
HASH_ALGORITHMS = ("sha256", "sha256_cbor")


@dataclass(frozen=True)
class RequestIdentity:
    """What `Store.match` and `Store.write` take besides token ids."""

    salt: bytes = b""
    adapter: str = ""
    extras: tuple[ExtraInput, ...] = ()


@dataclass(frozen=True)
class NotCached:
    """A request whose cache has no name that another request could have, and why."""

    reason: str


def identify(
    *,
    cache_salt: str | None = None,
    adapter: str = "",
    inputs: Iterable[tuple[int, int, str, str]] = (),
    has_embeddings: bool = False,
    tokens: int,
) -> RequestIdentity | NotCached:
    """The identity of a request, or why it has none.

    Args:
        cache_salt: the tenant's, as the engine was given it.
        adapter: from `adapter_name`.
        inputs: for each image and the like its place among the tokens (first, count), its kind and its digest.
        has_embeddings: whether embeddings stand in the place of token ids.
        tokens: of the prompt.
    """
    if has_embeddings:
        return NotCached("prompt embeddings: they have no token ids that would name what was computed")
    extras = []
    for first, count, kind, digest in inputs:
        if not digest:
            return NotCached(f"an input of kind {kind!r} at token {first} has no digest that would name it")
        if not 0 <= first < tokens or count < 1:
            return NotCached(f"an input of kind {kind!r} stands at tokens {first} to {first + count}, outside of it")
        extras.append(ExtraInput(first, _digest(INPUT_DOMAIN, kind, str(count), digest)))
    return RequestIdentity(_salt(cache_salt), adapter, tuple(extras))


def adapter_name(name: str, path: str, digest: str = "", variant: str = "") -> str:
    """The identity of a LoRA adapter: of its bytes where their digest is known, else of its name and path.

    Args:
        name, path: as the engine was given them.
        digest: from `adapter_digest`; two hosts need not have the adapter under one path then.
        variant: what else decides how it is applied.
    """
    fields = ("bytes", digest, variant) if digest else ("name", name, path, variant)
    return f"lora:{_digest(ADAPTER_DOMAIN, *fields).hex()}"


def adapter_digest(path: str | Path) -> str:
    """A digest of an adapter's files, in hex; empty if there is no such folder. Reads all of them.

    Raises:
        OSError: a file cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return ""
    whole = hashlib.sha256(ADAPTER_DOMAIN)
    files = _adapter_files(folder)
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        whole.update(_field(file.relative_to(folder).as_posix()) + content)
    return whole.hexdigest() if files else ""


def adapter_stamp(path: str | Path) -> tuple[tuple[str, int, int, int], ...]:
    """What is another one when an adapter's files were replaced: names, inodes, sizes, times. Reads none of them.

    Raises:
        OSError: a file has gone meanwhile.
    """
    folder = Path(path)
    if not folder.is_dir():
        return ()
    found = [(file.relative_to(folder).as_posix(), file.stat()) for file in _adapter_files(folder)]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def check_hash_root(*, algorithm: str, python_hash_seed: str | None) -> None:
    """Refuse an engine's own block hashes where two processes would not agree on them, or anybody could forge them.

    Args:
        algorithm: of the engine: `sha256`, `sha256_cbor`; others are refused.
        python_hash_seed: what `PYTHONHASHSEED` is set to in the engine's environment.

    Raises:
        ConfigError: with the remedy.
    """
    if algorithm not in HASH_ALGORITHMS:
        raise ConfigError(
            f"the engine hashes blocks by {algorithm!r}, and collisions can be made; use {' or '.join(HASH_ALGORITHMS)}"
        )
    if python_hash_seed is None or not python_hash_seed.isdecimal():
        raise ConfigError(
            f"PYTHONHASHSEED is {python_hash_seed!r}, so every process would have hashes of its own and find nothing; "
            "set it to one number for all of them, such as 0"
        )


def _adapter_files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file() and each.suffix in ADAPTER_SUFFIXES)


def _salt(cache_salt: str | None) -> bytes:
    raw = (cache_salt or "").encode("utf-8", "surrogatepass")
    if len(raw) <= SALT_BYTES_MAX and not raw.startswith(LONG_SALT):
        return raw
    return LONG_SALT + hashlib.sha256(raw).digest()


def _digest(domain: bytes, *fields: str) -> bytes:
    return hashlib.sha256(domain + b"".join(_field(field) for field in fields)).digest()


def _field(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(4, "little") + raw
