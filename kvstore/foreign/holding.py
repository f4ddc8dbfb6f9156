"""Objects that are kept in place until they were copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import OwnerGoneError, WriteError
from kvstore.foreign.regions import regions_of, size_of
from kvstore.limits import LOAD_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from kvstore.foreign.asking import AskedObject
    from kvstore.foreign.reading import ObjectReader
    from kvstore.foreign.regions import Memory
    from kvstore.pool import BaseHold


class ForeignHold:
    """Objects that stay where they are until released. Any thread; a context manager.

    Attributes:
        found: which of those that were asked for are held.
    """

    def __init__(
        self, reader: ObjectReader, objects: Sequence[AskedObject], found: list[bool], holds: dict[int, BaseHold]
    ) -> None:
        self.found = tuple(found)
        self._reader = reader
        self._objects = objects
        self._holds = holds

    def __enter__(self) -> ForeignHold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def get(self, memories: Sequence[Memory | None], *, deadline_s: float = LOAD_DEADLINE_S) -> list[bool]:
        """Copy objects into the caller's memory; which of them have come.

        Args:
            memories: one for each object that was asked for; None for those that are not wanted.
            deadline_s: for what is still being loaded.

        Raises:
            WriteError: memory of another size than the object has, or none. LeaseError: the hold was released.
        """
        if len(memories) != len(self._objects):
            raise WriteError(f"{len(memories)} memories were given for {len(self._objects)} objects")
        wanted = []
        for each, memory in zip(self._objects, memories, strict=True):
            hold = self._holds.get(each.number)
            if memory is None or hold is None:
                continue
            regions = regions_of(memory, is_written=True)
            if size_of(regions) != each.size_bytes:
                raise WriteError(f"an object of {each.size_bytes} bytes was given memory of {size_of(regions)}")
            wanted.append((each._replace(regions=regions), hold))
        answer = [False] * len(self._objects)
        try:
            self._reader.copy(wanted, answer, Deadline.after(deadline_s))
        except OwnerGoneError:
            answer = [False] * len(self._objects)
        return answer

    def release(self) -> None:
        """Let them go. Idempotent."""
        holds, self._holds = self._holds, {}
        for hold in holds.values():
            hold.release()
