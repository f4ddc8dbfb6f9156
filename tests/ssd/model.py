"""What an SSD directory must hold, may hold and must not hold, kept beside it while it is used and cut off."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError, SsdDirectoryError
from kvstore.testing.forgetful_disk import Fault, ForgetfulDisk
from kvstore.tiers.ssd.directory import SsdDirectory
from tests.ssd.contents import Name, Node, append, check_recovered, deadline, load_of, names_of, path_of

if TYPE_CHECKING:
    from kvstore.spec import ModelSpec

SEGMENT_BYTES = 64 << 10


@dataclass
class Counts:
    """What happened in a run; a run in which nothing happens shows nothing."""

    appends: int = 0
    failed: int = 0
    cuts: int = 0
    reopened: int = 0
    verified: int = 0
    rewrites: int = 0
    removed: int = 0
    forgotten: int = 0
    refused: int = 0


@dataclass
class DirectoryModel:
    """A directory on a disk that forgets, and what is known about it.

    Attributes:
        must: records that were reported durable and are still wanted, with their places.
        may: records that a crash may have kept, or that something else still holds an older copy of.
    """

    spec: ModelSpec
    seed: int
    disk: ForgetfulDisk = field(init=False)
    must: dict[Name, list[int]] = field(default_factory=dict)
    may: set[Name] = field(default_factory=set)
    waiting: list[tuple[bytes, bool]] = field(default_factory=list)
    nodes: dict[bytes, Node] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.disk = ForgetfulDisk(seed=self.seed)
        self.directory = self._open()

    def _open(self) -> SsdDirectory:
        """Opened again until it succeeds: power cuts and errors may come in between."""
        while True:
            if self.random.random() < 0.3:
                self.disk.cut_after(self.random.randrange(1, 12))
            if self.random.random() < 0.2:
                self.fault()
            files = self.disk.files()
            try:
                directory = SsdDirectory.open(files, self.spec, capacity_bytes=1 << 30, segment_bytes=SEGMENT_BYTES)
            except SsdDirectoryError:
                files.close()
                self.counts.refused += 1
                self.disk.faults.clear()
                continue
            self._disarm()
            self.disk.faults.clear()
            self.counts.cuts = self.disk.boots
            return directory

    def run(self, steps: int) -> None:
        actions = [self.append] * 8 + [self.forget, self.sync, self.rewrite, self.remove, self.reopen, self.fault]
        for _ in range(steps):
            if self.random.random() < 0.25:
                self.disk.cut_after(self.random.randrange(1, 25))
            self.random.choice(actions)()
            if self.disk.boots != self.counts.cuts or self.directory.trouble:
                self.reopen()
        self.disk.faults.clear()
        self.reopen()

    # Actions

    def append(self) -> None:
        prompt = self._prompt()
        stop = self.random.randrange(1, len(prompt) + 1)
        nodes = prompt[:stop]
        names = []
        for number, node in enumerate(nodes):
            for group in range(len(self.spec.groups)):
                units = self.spec.groups[group].all_units
                for span in range(len(self.spec.spans[group])):
                    is_attention = group in self.spec.attention_groups
                    name = (node.key, group, span, units.start, units.stop)
                    wanted = is_attention or (number == stop - 1 and self.random.random() < 0.8)
                    # Now and then once more what is there already, as reclaim does.
                    if wanted and (name not in self.must or self.random.random() < 0.1):
                        names.append((number, group, span, units))
        self.nodes.update((node.key, node) for node in nodes)
        load = load_of(self.spec, nodes, names)
        forgotten = list(self.waiting)
        try:
            placed = append(self.directory, load)
        except (OSError, DeadlineError):
            self.counts.failed += 1
            self.may.update(load.names)
            return
        self.counts.appends += 1
        self._forgotten_for_good(forgotten)
        for name, place in zip(load.names, placed.place.tolist(), strict=True):
            self.must[name] = place

    def forget(self) -> None:
        if not self.must:
            return
        name = self.random.choice(sorted(self.must))
        is_state = name[1] not in self.spec.attention_groups
        self.directory.forget([name[0]], [is_state])
        self.waiting.append((name[0], is_state))
        self.counts.forgotten += 1
        gone = self._at_or_below(name[0], is_state)
        self.may.update(gone)
        for each in gone:
            self.must.pop(each, None)

    def sync(self) -> None:
        forgotten = list(self.waiting)
        try:
            self.directory.sync(deadline())
        except (OSError, DeadlineError):
            self.counts.failed += 1
            return
        self._forgotten_for_good(forgotten)

    def rewrite(self) -> None:
        """With what a shelf would give: what it knows of, whole."""
        with_all = list(self.must)
        nodes = sorted({self.nodes[key] for key in self._with_ancestors(with_all)}, key=lambda node: node.end_tokens)
        numbers = {node.key: number for number, node in enumerate(nodes)}
        names = [
            (numbers[key], group, span, type(self.spec.groups[group].all_units)(start, stop))
            for key, group, span, start, stop in with_all
        ]
        if not names:
            return
        load = load_of(self.spec, nodes, names)
        for row, name in enumerate(load.names):
            load.records.place[row] = self.must[name]
        try:
            self.directory.rewrite_journal(load.nodes, load.records, deadline())
        except (OSError, DeadlineError):
            self.counts.failed += 1
            return
        self.counts.rewrites += 1
        self.waiting.clear()

    def remove(self) -> None:
        segments = self.directory.segments()
        if not segments:
            return
        number = self.random.choice(segments).number
        lost = [name for name, place in self.must.items() if place[0] == number]
        self.may.update(self.must)
        for name in lost:
            del self.must[name]
        self._keep_reachable()
        try:
            self.directory.remove_segments([number])
        except OSError:
            self.counts.failed += 1
            return
        self.counts.removed += 1

    def fault(self) -> None:
        what = self.random.choice(["write", "write", "sync", "create", "sync_names", "remove", "truncate"])
        number = self.random.choice([errno.ENOSPC, errno.ENOSPC, errno.EIO, errno.EROFS])
        name = self.random.choice(["", "journal", "segment"])
        skip = self.random.randrange(6)
        self.disk.faults.append(
            Fault(what, number, name, skip, is_short=what == "write" and self.random.random() < 0.5)
        )

    def reopen(self) -> None:
        """Close or leave it, start again, and compare."""
        if self.disk.boots == self.counts.cuts and not self.directory.trouble and self.random.random() < 0.5:
            forgotten = list(self.waiting)
            self.directory.close()
            if not self.directory.trouble and self.disk.boots == self.counts.cuts:
                self._forgotten_for_good(forgotten)
        elif self.random.random() < 0.5:
            self.disk.cut_power()
        self.disk.faults.clear()
        self._disarm()
        self.directory = self._open()
        found = check_recovered(self.spec, self.directory)
        missing = set(self.must) - found
        wrong = found - set(self.must) - self.may
        assert not missing, f"seed {self.seed}: {len(missing)} durable records are lost"
        assert not wrong, f"seed {self.seed}: {len(wrong)} records came back"
        self.counts.reopened += 1
        self.counts.verified += len(found)
        nodes, records = self.directory.recovered
        self.must = dict(zip(names_of(nodes, records), records.place.tolist(), strict=True))
        self.waiting.clear()

    # The model

    def _prompt(self) -> list[Node]:
        """One of few prompts that share beginnings."""
        branch = self.random.randrange(4)
        tokens = [*range(10), *(100 * branch + at for at in range(self.random.randrange(1, 14)))]
        return path_of(self.spec, tokens, salt=b"ab"[: self.random.randrange(3)])

    def _disarm(self) -> None:
        self.disk.cut_after(1 << 40)

    def _forgotten_for_good(self, forgotten: list[tuple[bytes, bool]]) -> None:
        for key, is_state in forgotten:
            for name in self._at_or_below(key, is_state):
                self.may.discard(name)
        self.waiting = [each for each in self.waiting if each not in forgotten]

    def _at_or_below(self, key: bytes, is_state: bool) -> set[Name]:
        everything = set(self.must) | self.may
        if is_state:
            return {name for name in everything if name[0] == key and name[1] in self.spec.state_groups}
        return {name for name in everything if key in self._with_ancestors([name])}

    def _with_ancestors(self, names: list[Name]) -> set[bytes]:
        found: set[bytes] = set()
        for name in names:
            key = name[0]
            while key in self.nodes:
                found.add(key)
                key = self.nodes[key].parent
        return found

    def _keep_reachable(self) -> None:
        attention = [
            (group, span, 0, self.spec.groups[group].unit_count)
            for group in self.spec.attention_groups
            for span in range(len(self.spec.spans[group]))
        ]
        for name in list(self.must):
            keys = self._with_ancestors([name])
            wanted = attention if name[1] in self.spec.state_groups else [name[1:]]
            if any((key, *each) not in self.must for key in keys for each in wanted):
                del self.must[name]
