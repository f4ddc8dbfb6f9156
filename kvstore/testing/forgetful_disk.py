"""A disk in memory that forgets: for tests of what survives a power cut, and of what happens when files fail.

    disk = ForgetfulDisk(seed=7)
    files = disk.files()             # a `kvstore.abc.Files`; every test that opens the directory again makes a new one
    disk.cut_after(12)               # the power goes off in the middle of the twelfth change from here
    ...                              # whatever uses `files` gets OSError from then on
    files = disk.files()             # what a machine that starts again would find

What was written and not synced is kept, lost or torn at sectors of 512 bytes, as the seed says, and so are sizes
and names. Operations of a batch run in an order of the seed's, when they are submitted, unless they are held.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.testing.forgetful_files import ForgetfulFiles

SECTOR_BYTES = 512
"""A disk writes a sector wholly or not at all; so much of a torn write survives at least."""
SURVIVALS = ("all", "none", "any", "any")
"""What a power cut keeps of what was not synced, by lot: everything, nothing, or each sector and name by lot."""


@dataclass
class Fault:
    """An error that a disk returns.

    Attributes:
        what: `read`, `write`, `sync`, `create`, `open`, `truncate`, `remove`, `sync_names` or `names`.
        number: the error number, such as `errno.ENOSPC`. Of a sync: what it should have made safe is forgotten, and the
            next sync succeeds, as Linux has it.
        name: only files whose name contains it.
        skip: how many operations pass before the first one fails.
        times: how many fail; None is every one from then on.
        is_short: of a read or write: half of its bytes are moved before it fails.
    """

    what: str
    number: int = errno.EIO
    name: str = ""
    skip: int = 0
    times: int | None = 1
    is_short: bool = False

    def strikes(self, what: str, name: str) -> bool:
        """Whether this operation fails; counts it."""
        if what != self.what or self.name not in name or self.times == 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(frozen=True)
class Change:
    """A write (`data`) or a change of size, at a moment of the disk's counter."""

    moment: int
    offset: int
    data: bytes | None


@dataclass
class Inode:
    """A file: as it is seen, as it would be after a cut that keeps nothing else, and what lies between.

    Attributes:
        used_bytes: up to where it has been written; what it is longer is a hole, which takes no room.
    """

    seen: bytearray = field(default_factory=bytearray)
    safe: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)
    used_bytes: int = 0


@dataclass(frozen=True, eq=False)
class _Held:
    owner: object
    run: Callable[[], None]
    fail: Callable[[OSError], None]


class ForgetfulDisk:
    """What survives; `files` looks at it. Any thread.

    Args:
        seed: of everything that is left to chance.
        capacity_bytes: a write beyond it fails with ENOSPC.
        directory: its name in messages.

    Attributes:
        changes: writes, syncs, truncations and changes of names so far: what `cut_after` counts.
        faults: errors to come; a test appends to it and clears it.
    """

    def __init__(
        self, *, seed: int = 0, capacity_bytes: int = 1 << 30, directory: str = "(a directory that forgets)"
    ) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self.changes = 0
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.names: dict[str, Inode] = {}
        self._safe_names: dict[str, Inode] = {}
        self._name_history: dict[str, list[Inode | None]] = {}
        self._boots = 0
        self._cut_at: int | None = None
        self._moment = 0
        self._is_held = False
        self._is_held_as_begun = False
        self._held: list[_Held] = []

    def files(self) -> ForgetfulFiles:
        """The disk as it is, opened (again)."""
        from kvstore.testing.forgetful_files import ForgetfulFiles

        return ForgetfulFiles(self)

    # Power

    def cut_power(self) -> None:
        """What is not safe is kept, lost or torn; whoever has the files open gets EIO from here on."""
        with self.lock:
            survival = self.random.choice(SURVIVALS)
            for name, history in self._name_history.items():
                states = [self._safe_names.get(name), *history]
                kept = {"all": states[-1], "none": states[0]}.get(survival, self.random.choice(states))
                if kept is None:
                    self._safe_names.pop(name, None)
                else:
                    self._safe_names[name] = kept
            for inode in {id(inode): inode for inode in self._safe_names.values()}.values():
                self._settle(inode, survival)
            self.names = dict(self._safe_names)
            self._name_history.clear()
            self._cut_at = None
            self._boots += 1
            held, self._held = self._held, []
            self._is_held = False
            for operation in held:
                operation.fail(power_is_off())

    def cut_after(self, changes: int) -> None:
        """Cut the power in the middle of the change number `changes` from here (1 is the next)."""
        with self.lock:
            self._cut_at = self.changes + changes

    @property
    def boots(self) -> int:
        """How often the power was cut."""
        return self._boots

    def _settle(self, inode: Inode, survival: str) -> None:
        """Let what is pending of a file survive, or not."""
        size_max = max([len(inode.safe), *(_end(change) for change in inode.pending)])
        for change in inode.pending:
            if survival == "none" or (survival == "any" and self.random.random() < 0.3):
                continue
            if change.data is None or survival == "all" or self.random.random() < 0.4:
                apply(inode.safe, change)
                continue
            for at in range(0, len(change.data), SECTOR_BYTES):
                if self.random.random() < 0.5:
                    sector = change.data[at : at + SECTOR_BYTES]
                    apply(inode.safe, Change(change.moment, change.offset + at, sector))
        if survival == "any" and len(inode.safe) < size_max and self.random.random() < 0.3:
            apply(inode.safe, Change(0, size_max, None))
        inode.pending.clear()
        inode.seen = bytearray(inode.safe)
        inode.used_bytes = len(inode.safe.rstrip(b"\0"))

    # Slowness

    def hold(self, *, is_begun: bool = False) -> None:
        """Operations that are submitted from here on do not end before `release`.

        Args:
            is_begun: they count as begun, so that `cancel` and `close` must wait for them.
        """
        with self.lock:
            self._is_held, self._is_held_as_begun = True, is_begun

    def release(self, count: int | None = None) -> int:
        """Let so many of those that are held end, in an order of the seed's; all if None, and hold no more."""
        with self.lock:
            if count is None:
                self._is_held = False
            chosen = self.random.sample(self._held, min(len(self._held), len(self._held) if count is None else count))
            self._held = [operation for operation in self._held if operation not in chosen]
            for operation in chosen:
                operation.run()
            return len(chosen)

    # Looking and damaging, past the files

    def peek(self, name: str) -> bytes:
        """The bytes of a file as they are seen."""
        with self.lock:
            return bytes(self.names[name].seen)

    def poke(self, name: str, offset: int, data: bytes) -> None:
        """Change bytes of a file for good, behind everybody's back."""
        with self.lock:
            inode = self.names[name]
            for into in (inode.seen, inode.safe):
                apply(into, Change(0, offset, data))

    def flip(self, name: str, bit: int) -> None:
        """Flip one bit of a file for good."""
        byte = self.peek(name)[bit // 8]
        self.poke(name, bit // 8, bytes([byte ^ (1 << bit % 8)]))

    def cut_file(self, name: str, size_bytes: int) -> None:
        """Cut a file for good."""
        with self.lock:
            inode = self.names[name]
            inode.seen = inode.seen[:size_bytes]
            inode.safe = inode.safe[:size_bytes]

    def rename(self, name: str, other: str) -> None:
        """Give a file another name for good."""
        with self.lock:
            for names in (self.names, self._safe_names):
                if name in names:
                    names[other] = names.pop(name)

    def delete(self, name: str) -> None:
        """Remove a name for good."""
        with self.lock:
            self.names.pop(name)
            self._safe_names.pop(name, None)
            self._name_history.pop(name, None)

    @property
    def used_bytes(self) -> int:
        with self.lock:
            return sum(inode.used_bytes for inode in self.names.values())

    # For `ForgetfulFiles`, under the lock

    def now(self) -> int:
        """A moment after every earlier one."""
        self._moment += 1
        return self._moment

    def check(self, boot: int, what: str, name: str) -> Fault | None:
        """Raise if the power went off since `boot`, or a fault strikes; a short one is returned."""
        if boot != self._boots:
            raise power_is_off()
        for fault in self.faults:
            if fault.strikes(what, name):
                if fault.is_short:
                    return fault
                raise OSError(fault.number, os.strerror(fault.number), name)
        return None

    def count_change(self) -> None:
        """A change was begun and is pending; the power may go off in it."""
        self.changes += 1
        if self._cut_at is not None and self.changes >= self._cut_at:
            self.cut_power()
            raise power_is_off()

    def change_name(self, name: str, inode: Inode | None) -> None:
        """A name comes (or goes, for None)."""
        self._name_history.setdefault(name, []).append(inode)
        if inode is None:
            del self.names[name]
        else:
            self.names[name] = inode

    def save_names(self) -> None:
        self._safe_names = dict(self.names)
        self._name_history.clear()

    def begin(self, owner: object, run: Callable[[], None], fail: Callable[[OSError], None]) -> None:
        """Run an operation of a batch (`owner`), or hold it."""
        if self._is_held:
            self._held.append(_Held(owner, run, fail))
        else:
            run()

    def drop_held(self, owner: object) -> None:
        """Those of a batch that have not begun end with ECANCELED."""
        if self._is_held_as_begun:
            return
        dropped = [operation for operation in self._held if operation.owner is owner]
        self._held = [operation for operation in self._held if operation.owner is not owner]
        for operation in dropped:
            operation.fail(OSError(errno.ECANCELED, os.strerror(errno.ECANCELED)))


def apply(data: bytearray, change: Change) -> None:
    """Make a change to the bytes of a file."""
    if change.data is None:
        del data[change.offset :]
        data.extend(bytes(change.offset - len(data)))
        return
    data.extend(bytes(max(0, change.offset - len(data))))
    data[change.offset : change.offset + len(change.data)] = change.data


def _end(change: Change) -> int:
    return change.offset + len(change.data or b"")


def power_is_off() -> OSError:
    """What every operation gets whose disk has lost its power."""
    return OSError(errno.EIO, "the power went off")
