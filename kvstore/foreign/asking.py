"""What a caller asks of a foreign store, checked: objects by their names in the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import SpecError, WriteError
from kvstore.foreign.namespace import check_size
from kvstore.foreign.regions import regions_of, size_of
from kvstore.limits import FOREIGN_BATCH_BYTES, FOREIGN_BATCH_OBJECTS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvstore.foreign.namespace import GroupHasher
    from kvstore.foreign.regions import Memory, Region


class AskedObject(NamedTuple):
    """What is asked for: where it is in the answer, its name in the store, its size, and the caller's memory."""

    number: int
    name: bytes
    size_bytes: int
    regions: Sequence[Region]


def asked_objects(
    hashers: Mapping[str, GroupHasher],
    sizes: Mapping[str, int],
    group: str | Sequence[str],
    keys: Sequence[bytes],
    memories: Sequence[Memory] | None,
    *,
    sizes_bytes: Sequence[int] | None = None,
    is_written: bool = False,
) -> list[AskedObject]:
    """Objects under an engine's keys.

    Args:
        hashers, sizes: of each group: names of its objects, and their bytes.
        group, keys, memories, sizes_bytes: as `ForeignStore.put` and `has`.
        is_written: the memories are.

    Raises:
        SpecError: a group that there is not, a key or size that is none. WriteError: memory that is none, too much.
    """
    count = len(keys)
    if count > FOREIGN_BATCH_OBJECTS_MAX:
        raise WriteError(f"{count} objects in one call are over the limit of {FOREIGN_BATCH_OBJECTS_MAX}")
    groups = [group] * count if isinstance(group, str) else list(group)
    if len({count, len(groups), *(len(each) for each in (memories, sizes_bytes) if each is not None)}) > 1:
        raise WriteError(f"{count} keys need as many groups, memories and sizes")
    objects = []
    for number, (name, key) in enumerate(zip(groups, keys, strict=True)):
        hasher = hashers.get(name)
        if hasher is None:
            raise SpecError(f"this namespace has no group {name!r}; it has {', '.join(hashers)}")
        regions: Sequence[Region] = ()
        if memories is not None:
            regions = regions_of(memories[number], is_written=is_written)
            size_bytes = size_of(regions)
        else:
            size_bytes = sizes[name] if sizes_bytes is None else sizes_bytes[number]
        check_size(size_bytes, f"an object of group {name!r}")
        objects.append(AskedObject(number, hasher.name(key), size_bytes, regions))
    return objects


def in_parts(objects: Sequence[AskedObject]) -> Iterator[Sequence[AskedObject]]:
    """Objects that are stored or loaded together: what is under way keeps its memory."""
    first, size_bytes = 0, 0
    for number, each in enumerate(objects):
        if number > first and size_bytes + each.size_bytes > FOREIGN_BATCH_BYTES:
            yield objects[first:number]
            first, size_bytes = number, 0
        size_bytes += each.size_bytes
    if first < len(objects):
        yield objects[first:]
