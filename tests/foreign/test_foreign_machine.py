"""A foreign store against a dict: sizes, groups, tenants, ranks, eviction, damage, and opening it again from disk."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvstore
from kvstore.foreign import ForeignNamespace, ForeignStore

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS = (("kv", 24 * 1024), ("state", 8 * 1024))
CHUNK_BYTES = 8 * 1024
RANKS = 2
LIMIT_S = 30.0

Name = tuple[int, str, bytes, bytes, int]
"""Rank, group, salt, key, size."""

names = st.tuples(
    st.integers(0, RANKS - 1),
    st.sampled_from([name for name, _ in GROUPS]),
    st.sampled_from([b"", b"one"]),
    st.sampled_from([b"%d" % number for number in range(3)]),
    st.sampled_from([1, 8 * 1024, 8 * 1024 + 1, 24 * 1024]),
)


class ForeignMachine(RuleBasedStateMachine):
    """What is put may be evicted, but what is found is what was put last under that very name.

    An engine's key stands for one content, so putting another one is a matter of another key: the model keeps the
    first content that was accepted as long as the name may be there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="foreign-"))
        self.contents: dict[Name, bytes] = {}
        self.stores: list[ForeignStore] = []

    @initialize(has_disk=st.booleans(), has_little_memory=st.booleans())
    def begin(self, has_disk: bool, has_little_memory: bool) -> None:
        self.has_disk = has_disk
        self.dram = "256KiB" if has_little_memory else "4MiB"
        self.open()

    def open(self) -> None:
        own = [
            ForeignNamespace(
                "tiny", "random", "vllm", "1", "sha256", b"root", GROUPS, rank, RANKS, chunk_bytes=CHUNK_BYTES
            )
            for rank in range(RANKS)
        ]
        self.store = kvstore.open(own[0].spec, dram=self.dram, ssd=f"{self.folder}:16MiB" if self.has_disk else None)
        self.stores = [ForeignStore(self.store, each) for each in own]

    def content(self, name: Name) -> bytes:
        return np.random.default_rng(zlib.crc32(repr(name).encode())).bytes(name[4])

    def teardown(self) -> None:
        for each in self.stores:
            each.close()
        if self.stores:
            self.store.close()
        shutil.rmtree(self.folder)

    @rule(batch=st.lists(names, min_size=1, max_size=5), is_async=st.booleans())
    def put(self, batch: Sequence[Name], is_async: bool) -> None:
        for rank, salt in {(name[0], name[2]) for name in batch}:
            some = [name for name in batch if (name[0], name[2]) == (rank, salt)]
            groups, keys = [name[1] for name in some], [name[3] for name in some]
            values = [self.content(name) for name in some]
            store = self.stores[rank]
            if is_async:
                stored = store.put_async(groups, keys, values, salt=salt).result(LIMIT_S)
            else:
                stored = store.put(groups, keys, values, salt=salt)
            for name, value, is_stored in zip(some, values, stored, strict=True):
                if is_stored:
                    self.contents[name] = value

    @rule(data=st.data(), is_held=st.booleans())
    def get_what_was_put(self, data: st.DataObject, is_held: bool) -> None:
        if self.contents:
            self.get(data.draw(st.lists(st.sampled_from(sorted(self.contents)), min_size=1, max_size=8)), is_held)

    @rule(batch=st.lists(names, min_size=1, max_size=8), is_held=st.booleans())
    def look_for_anything(self, batch: Sequence[Name], is_held: bool) -> None:
        self.get(batch, is_held)

    def get(self, batch: Sequence[Name], is_held: bool) -> None:
        for rank, salt in {(name[0], name[2]) for name in batch}:
            some = [name for name in batch if (name[0], name[2]) == (rank, salt)]
            groups, keys, sizes = ([name[field] for name in some] for field in (1, 3, 4))
            read = [bytearray(name[4]) for name in some]
            store = self.stores[rank]
            if is_held:
                with store.hold(groups, keys, sizes_bytes=sizes, salt=salt) as hold:
                    come = hold.get(read)
                    assert come == list(hold.found)
            else:
                come = store.get(groups, keys, read, salt=salt)
            for name, value, has_come in zip(some, read, come, strict=True):
                if has_come:
                    assert bytes(value) == self.contents[name]

    @rule(batch=st.lists(names, min_size=1, max_size=8))
    def has(self, batch: Sequence[Name]) -> None:
        for name in batch:
            rank, group, salt, key, size_bytes = name
            (found,) = self.stores[rank].has(group, [key], sizes_bytes=[size_bytes], salt=salt)
            assert not found or name in self.contents
            if not found:
                self.contents.pop(name, None)

    @rule(name=names)
    def remove(self, name: Name) -> None:
        rank, group, salt, key, size_bytes = name
        if size_bytes != dict(GROUPS)[group]:
            return
        if self.has_disk:
            self.store.flush(LIMIT_S)
        (removed,) = self.stores[rank].remove(group, [key], salt=salt)
        assert not removed or name in self.contents
        assert self.stores[rank].has(group, [key], salt=salt) == [False]
        self.contents.pop(name, None)

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), at=st.integers(0, 24 * 1024 - 1))
    def damage(self, data: st.DataObject, at: int) -> None:
        """A flipped bit in memory is a miss, and then gone from there."""
        name = data.draw(st.sampled_from(sorted(self.contents)))
        rank, group, salt, key, size_bytes = name
        store = self.stores[rank]
        with store.hold(group, [key], sizes_bytes=[size_bytes], salt=salt) as hold:
            if not hold.found[0]:
                return
            records = hold._holds[0].records
            at %= size_bytes
            record = records[at // CHUNK_BYTES]
            address = int(hold._holds[0].arrays[1][at // CHUNK_BYTES])
            byte = ctypes.c_uint8.from_address(address + record.layout.pieces[0].offset + at % CHUNK_BYTES)
            byte.value ^= 4
        before = store.statistics().missed.get("damaged", 0)
        assert store.get(group, [key], [bytearray(size_bytes)], salt=salt) == [False]
        assert store.statistics().missed["damaged"] == before + 1

    @rule()
    def open_again(self) -> None:
        for each in self.stores:
            each.close()
        if self.has_disk:
            self.store.flush(LIMIT_S)
        self.store.close()
        if not self.has_disk:
            self.contents.clear()
        self.open()

    @invariant()
    def memory_is_sound(self) -> None:
        if self.stores:
            self.store.pool.check()  # type: ignore[attr-defined]


TestForeignMachine = ForeignMachine.TestCase
TestForeignMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
