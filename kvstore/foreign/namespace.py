"""Whose keys are meant, and what the objects under them are cut into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from struct import Struct

from kvstore.errors import SpecError
from kvstore.limits import (
    FOREIGN_CHUNK_BYTES_MAX,
    FOREIGN_CHUNKS_MAX,
    FOREIGN_GROUPS_MAX,
    FOREIGN_NAME_BYTES_MAX,
    FOREIGN_OBJECT_BYTES_MAX,
    RECORD_ALIGN_BYTES,
)
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

OBJECT_DOMAIN = b"kvstore.foreign.object.v1\0"

_CRYPTOGRAPHIC = ("sha256", "sha384", "sha512", "sha3", "blake2", "blake3")
_U32 = Struct("<I")
_RECORD_COST_BYTES = 4096
"""What one more record costs besides its slot, in bytes: its place in the index, the time to handle it."""
_PARTS_MAX = 256
_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class ForeignNamespace:
    """What makes two engines' objects under one key the same bytes. A frozen value; docs/foreign.md has the grammar.

    Attributes:
        model: name of the model, as `ModelSpec.model`.
        weights: identity of the weights, as `ModelSpec.weights`; there is no default.
        engine: whose keys these are: `vllm`, `sglang`.
        version: of the engine: what it puts into its rows may change with it.
        hash_algorithm: what the engine's keys are made with: `sha256`, `sha256_cbor`.
        hash_root: what its chains of keys begin with. One that differs from process to process is not pinned: pass
            None, which is refused, rather than what it happens to be.
        groups: names of the engine's groups, and the bytes that an object of each has.
        rank, ranks: whose share of the cache the objects are.
        layout: further facts that decide what the bytes mean (element type, order of the axes, layers of this
            pipeline stage), as name and value pairs.
        chunk_bytes: objects are cut into records of so many bytes; chosen from the sizes of `groups` by default. It
            belongs to the identity of the store: engines that share one name the same.

    Raises:
        SpecError: the root is not pinned, the hash is not cryptographic, or a name or size is out of its limits.
    """

    model: str
    weights: str
    engine: str
    version: str
    hash_algorithm: str
    hash_root: bytes | None
    groups: tuple[tuple[str, int], ...]
    rank: int = 0
    ranks: int = 1
    layout: tuple[tuple[str, str], ...] = ()
    chunk_bytes: int = 0

    def __post_init__(self) -> None:
        for what in ("model", "weights", "engine", "version", "hash_algorithm"):
            _check_name(what, getattr(self, what))
        if not self.hash_algorithm.lower().replace("-", "").startswith(_CRYPTOGRAPHIC):
            raise SpecError(
                f"{self.engine} makes its keys with {self.hash_algorithm!r}, which is no cryptographic hash: two "
                "prompts may have one key, and one would be answered with the other's cache. Set sha256"
            )
        if not isinstance(self.hash_root, bytes) or not self.hash_root:
            raise SpecError(
                f"the hash root of {self.engine} is not pinned: its keys differ from process to process, so nothing "
                "would ever be found again. Set PYTHONHASHSEED to one fixed value in all of its processes"
            )
        if len(self.hash_root) > FOREIGN_NAME_BYTES_MAX:
            raise SpecError(f"a hash root has at most {FOREIGN_NAME_BYTES_MAX} bytes, not {len(self.hash_root)}")
        if type(self.rank) is not int or type(self.ranks) is not int or not 0 <= self.rank < self.ranks:
            raise SpecError(f"rank {self.rank!r} of {self.ranks!r} is out of range")
        if not 1 <= len(self.groups) <= FOREIGN_GROUPS_MAX or len(dict(self.groups)) != len(self.groups):
            raise SpecError(f"a namespace has 1 to {FOREIGN_GROUPS_MAX} groups, each named once")
        for group, size_bytes in self.groups:
            _check_name("group", group)
            check_size(size_bytes, f"an object of group {group!r}")
        for name, value in self.layout:
            _check_name("layout", name)
            _check_name("layout", value)
        if list(self.layout) != sorted(dict(self.layout).items()):
            raise SpecError("layout= has its pairs sorted by name, each name once")
        if type(self.chunk_bytes) is not int or not 0 <= self.chunk_bytes <= FOREIGN_CHUNK_BYTES_MAX:
            raise SpecError(f"chunk_bytes={self.chunk_bytes!r} is not 1 to {FOREIGN_CHUNK_BYTES_MAX}, or 0 to choose")
        if not self.chunk_bytes:
            object.__setattr__(self, "chunk_bytes", chunk_bytes_for([size_bytes for _, size_bytes in self.groups]))

    @cached_property
    def spec(self) -> ModelSpec:
        """What the store is opened with: objects of any namespace of this model and chunk size share it."""
        chunk = TensorSpec("bytes", DType.UINT8, (Segment("chunk", 1, 1),), (self.chunk_bytes,), has_tokens=True)
        group = CacheGroup("foreign", ReuseRule.ATTENTION, (0,), (chunk,))
        return ModelSpec(f"foreign {self.model}", self.weights, 1, (group,))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of an object of each group."""
        return dict(self.groups)

    def object_key(self, group: str, key: bytes) -> bytes:
        """The name of an object in the store, 32 bytes: what docs/foreign.md says."""
        return self.hasher(group).name(key)

    def hasher(self, group: str) -> GroupHasher:
        """Makes names of the objects of one group."""
        return GroupHasher(self, group)


class GroupHasher:
    """What all names of a group's objects begin with, hashed once. Any thread."""

    def __init__(self, namespace: ForeignNamespace, group: str) -> None:
        fields = [
            namespace.spec.fingerprint,
            namespace.engine.encode(),
            namespace.version.encode(),
            namespace.hash_algorithm.encode(),
            namespace.hash_root or b"",
        ]
        parts = [OBJECT_DOMAIN, *(_field(each) for each in fields)]
        parts.append(_U32.pack(namespace.rank) + _U32.pack(namespace.ranks))
        parts.append(_U32.pack(len(namespace.layout)))
        parts.extend(_field(text.encode()) for pair in namespace.layout for text in pair)
        parts.append(_field(group.encode()))
        self._begun = sha256(b"".join(parts))

    def name(self, key: bytes) -> bytes:
        """SHA-256 of all that the namespace says, the group and the engine's own key.

        Raises:
            SpecError: the key is no bytes, is empty, or longer than `FOREIGN_NAME_BYTES_MAX`.
        """
        if not isinstance(key, bytes) or not 1 <= len(key) <= FOREIGN_NAME_BYTES_MAX:
            raise SpecError(f"an engine's key is 1 to {FOREIGN_NAME_BYTES_MAX} bytes, not {key!r}")
        digest = self._begun.copy()
        digest.update(_U32.pack(len(key)) + key)
        return digest.digest()


def chunk_bytes_for(sizes_bytes: list[int]) -> int:
    """The chunk with which objects of these sizes take the least memory, all in all; they need not be alike."""
    candidates = {
        size // parts
        for size in sizes_bytes
        for parts in range(1, _PARTS_MAX + 1)
        if size % parts == 0 and size // parts <= FOREIGN_CHUNK_BYTES_MAX
    }
    candidates.add(min(max(sizes_bytes), FOREIGN_CHUNK_BYTES_MAX))  # of sizes that divide by nothing
    fitting = [each for each in candidates if all(-(-size // each) <= FOREIGN_CHUNKS_MAX for size in sizes_bytes)]
    return min(fitting, key=lambda chunk: (sum(_stored_bytes(size, chunk) / size for size in sizes_bytes), -chunk))


def _stored_bytes(size_bytes: int, chunk_bytes: int) -> int:
    body = -(-(chunk_bytes + _CHECKSUM_BYTES) // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES
    return -(-size_bytes // chunk_bytes) * (RECORD_ALIGN_BYTES + body + _RECORD_COST_BYTES)


def check_size(size_bytes: int, what: str) -> None:
    """Raise `SpecError` unless it is the size of an object."""
    if type(size_bytes) is not int or not 1 <= size_bytes <= FOREIGN_OBJECT_BYTES_MAX:
        raise SpecError(f"{what} has 1 to {FOREIGN_OBJECT_BYTES_MAX} bytes, not {size_bytes!r}")


def _check_name(what: str, text: str) -> None:
    if not isinstance(text, str) or not 1 <= len(text.encode(errors="replace")) <= FOREIGN_NAME_BYTES_MAX:
        raise SpecError(f"{what}={text!r} of a foreign namespace is a text of 1 to {FOREIGN_NAME_BYTES_MAX} bytes")


def _field(data: bytes) -> bytes:
    return _U32.pack(len(data)) + data
