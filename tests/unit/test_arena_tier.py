"""What the arena does beyond the conformance kit."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.errors import ArenaError, RecordTooLargeError, StaleSlotError, StoreClosedError
from kvstore.limits import RECORD_ALIGN_BYTES
from kvstore.record import slot_sizes_bytes
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.store import open_store
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.specs import check_lease, hybrid, put_all
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Slot

ROOT = Path(__file__).parents[2]
PAGE = RECORD_ALIGN_BYTES
TEST_S = 60


def taken(tier: ArenaTier, pages: int, count: int) -> list[Slot]:
    slots = tier.allocate_all([pages * PAGE] * count)
    assert slots is not None
    return slots


# Slots


def test_slots_are_page_aligned() -> None:
    """As direct I/O needs them."""
    with closing(ArenaTier(64 * PAGE, largest_slot_bytes=8 * PAGE)) as tier:
        for pages in (1, 3, 1, 5):
            (slot,) = taken(tier, pages, 1)
            assert np.frombuffer(tier.view(slot), np.uint8).ctypes.data % PAGE == 0


def test_a_place_is_reused_under_a_new_generation() -> None:
    with closing(ArenaTier(4 * PAGE, largest_slot_bytes=PAGE)) as tier:
        (first,) = taken(tier, 1, 1)
        tier.free(first)
        (second,) = taken(tier, 1, 1)
        assert second.index == first.index
        assert second.generation > first.generation
        with pytest.raises(StaleSlotError, match="match again"):
            tier.view(first)


def test_only_a_pinned_slot_has_a_location() -> None:
    with closing(ArenaTier(16 * PAGE, largest_slot_bytes=4 * PAGE)) as tier:
        slots = taken(tier, 1, 3)
        with pytest.raises(StaleSlotError, match="not pinned"):
            tier.location(slots[0])
        with pytest.raises(StaleSlotError, match="not pinned"):
            tier.locations(slots)
        tier.pin_all(slots)
        locations = tier.locations(slots)
        assert locations.dtype == np.uint64
        assert locations.tolist() == [tier.location(slot) for slot in slots]
        for slot in slots:
            tier.view(slot)[:] = bytes([slot.index + 1]) * PAGE
            begin = tier.location(slot)
            assert tier.memory[begin : begin + PAGE] == bytes([slot.index + 1]) * PAGE
        tier.free(slots[0])
        with pytest.raises(StaleSlotError):
            tier.location(slots[0])
        tier.unpin_all(slots)


def test_slots_move_together_for_another_size() -> None:
    """Half of the memory is free and no slab is; the pinned slots stay where they are, the others keep their bytes."""
    with closing(ArenaTier(32 * PAGE, largest_slot_bytes=4 * PAGE, slot_sizes_bytes=[4 * PAGE])) as tier:
        assert tier.statistics().slab_bytes == 4 * PAGE
        slots = taken(tier, 1, 32)
        tier.free_all(slots[::2])
        kept = slots[1::2]
        for slot in kept:
            tier.view(slot)[:] = bytes([slot.index]) * PAGE
        pinned = kept[:2]
        tier.pin_all(pinned)
        places = tier.locations(pinned).tolist()
        large = taken(tier, 4, 4)
        statistics = tier.statistics()
        assert statistics.relocated_bytes == 8 * PAGE
        assert [(each.slot_bytes, each.slabs, each.live_slots) for each in statistics.classes] == [
            (PAGE, 4, 16),
            (4 * PAGE, 4, 4),
        ]
        assert tier.locations(pinned).tolist() == places
        for slot in large:
            tier.view(slot)[:] = b"\xff" * slot.size_bytes
        for slot in kept:
            assert tier.view(slot) == bytes([slot.index]) * PAGE
        assert tier.allocate(4 * PAGE) is None
        tier.unpin_all(pinned)
        tier.check()


def test_sizes_that_an_arena_was_not_opened_for() -> None:
    with closing(ArenaTier(16 * PAGE, largest_slot_bytes=4 * PAGE, slot_sizes_bytes=[4 * PAGE])) as tier:
        with pytest.raises(RecordTooLargeError, match="largest slot"):
            tier.allocate(5 * PAGE)
        assert not tier.would_fit([4 * PAGE] * 5)
        with pytest.raises(RecordTooLargeError):
            tier.would_fit([PAGE, 5 * PAGE])


def test_slots_are_tuples_of_three() -> None:
    with closing(ArenaTier(4 * PAGE)) as tier:
        (slot,) = taken(tier, 1, 1)
        with pytest.raises(TypeError, match="index, generation"):
            tier.free(slot[:2])  # type: ignore[arg-type]
        with pytest.raises(StaleSlotError, match="no such slot"):
            tier.free(slot._replace(index=1 << 40))
        with pytest.raises(OverflowError):
            tier.free(slot._replace(generation=-1))
        tier.free(slot)


# The mapping


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("kvstore-arena")


def test_views_outlive_the_arena_and_the_memory_goes_with_them() -> None:
    before = mappings()
    with leaves_nothing():
        tier = ArenaTier(PAGE)
        (slot,) = taken(tier, 1, 1)
        view = tier.view(slot)
        view[:4] = b"kept"
        tier.close()
        assert view[:4] == b"kept"
        view[:4] = b"safe"
        assert mappings() == before + 1
    view.release()
    assert mappings() == before


def test_closed() -> None:
    tier = ArenaTier(4 * PAGE)
    (slot,) = taken(tier, 1, 1)
    tier.pin(slot)
    tier.close()
    tier.close()
    assert (tier.used_bytes, tier.quarantined_bytes) == (0, 0)
    for use in (
        lambda: tier.allocate(PAGE),
        lambda: tier.descriptor,
        lambda: tier.memory,
        lambda: tier.would_fit([PAGE]),
    ):
        with pytest.raises(StoreClosedError):
            use()
    for use in (lambda: tier.view(slot), lambda: tier.unpin(slot), lambda: tier.free(slot)):
        with pytest.raises(StaleSlotError):
            use()


def test_nobody_can_shrink_a_memfd() -> None:
    """A process that attaches and shortens the file would make the owner's next access a SIGBUS."""
    with closing(ArenaTier(4 * PAGE)) as tier:
        assert tier.kind == "memfd"
        for size_bytes in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(tier.descriptor, size_bytes)


def test_every_page_exists_from_the_start() -> None:
    with closing(ArenaTier(1 << 20)) as tier:
        status = os.fstat(tier.descriptor)
        assert status.st_blocks * 512 >= status.st_size >= 1 << 20


def test_huge_pages_are_used_or_it_is_said_why_not() -> None:
    for capacity_bytes in (16 * PAGE, 4 << 20):
        with closing(ArenaTier(capacity_bytes)) as tier:
            assert tier.huge_pages.in_use == (tier.huge_pages.why_not == "")
            if capacity_bytes < 1 << 20 and not tier.huge_pages.in_use:
                assert "smaller than one huge page" in tier.huge_pages.why_not


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ArenaError, match=r"allocated in full at open.*(MemAvailable|control group).*less memory"):
        ArenaTier(1 << 60)
    with leaves_nothing(), pytest.raises(ArenaError, match="less memory"):
        open_store(hybrid(), dram="1000000GiB")


def test_an_arena_of_less_than_a_page() -> None:
    for capacity_bytes in (0, 1, PAGE - 1):
        with closing(ArenaTier(capacity_bytes)) as tier:
            assert not tier.fits_when_empty([PAGE]) if capacity_bytes > PAGE else tier.capacity_bytes == capacity_bytes
            with pytest.raises(RecordTooLargeError):
                tier.allocate(PAGE)
    with pytest.raises(ValueError, match="at least 0"):
        ArenaTier(-1)


# Names


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("there is no /dev/shm")
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"test-{os.getpid()}-{request.node.name}")
    yield name
    if os.path.exists(path_of(name)):
        os.unlink(path_of(name))
        pytest.fail(f"{path_of(name)} was left behind")


def path_of(name: str) -> str:
    return f"/dev/shm/kvstore-{name}"


@contextmanager
def script(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed "ready"; it is killed at the end."""
    code = "import os, sys\nfrom kvstore.tiers import ArenaTier\n" + text
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TEST_S)


OWNER = """
tier = ArenaTier(1 << 20, name=sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_named_arena_appears_and_goes(name: str) -> None:
    with leaves_nothing(), closing(ArenaTier(1 << 20, name=name)) as tier:
        assert (tier.kind, tier.path) == ("shm", path_of(name))
        assert os.stat(path_of(name)).st_mode & 0o777 == 0o600
        assert os.stat(path_of(name)).st_ino == os.fstat(tier.descriptor).st_ino
        assert Path(path_of(name)).read_bytes()[:7] == b"KVARENA"
    assert not os.path.exists(path_of(name))


@pytest.mark.parametrize("bad", ["", "a/b", "../a", "a b", "x" * 129, "\n"])
def test_names_that_are_none(bad: str) -> None:
    with pytest.raises(ValueError, match="an arena's name"):
        ArenaTier(PAGE, name=bad)


def test_a_second_owner_is_refused(name: str) -> None:
    with closing(ArenaTier(PAGE, name=name)):
        with leaves_nothing(), pytest.raises(ArenaError, match=rf"owned by process {os.getpid()};.*another name"):
            ArenaTier(PAGE, name=name)
        assert os.path.exists(path_of(name))
    with script(OWNER, name) as owner:
        with pytest.raises(ArenaError, match=f"owned by process {owner.pid}"):
            ArenaTier(PAGE, name=name)
        owner.communicate(timeout=TEST_S)  # ends by itself, and takes the name along or leaves remains
    ArenaTier(PAGE, name=name).close()


def test_remains_of_a_dead_owner_are_removed(name: str) -> None:
    with script(OWNER, name) as owner:
        remains = os.stat(path_of(name))
        owner.kill()
        owner.wait(TEST_S)
    assert os.stat(path_of(name)).st_ino == remains.st_ino, "a killed process cannot clean up"
    with closing(ArenaTier(PAGE, name=name)) as tier:
        assert os.fstat(tier.descriptor).st_ino == os.stat(path_of(name)).st_ino
        assert os.stat(path_of(name)).st_size < remains.st_size


def test_who_was_passed_the_memory_keeps_no_name_alive(name: str) -> None:
    """A process that still maps a dead owner's arena must not be taken for the owner."""
    with script(OWNER, name) as owner:
        descriptor = os.open(f"/proc/{owner.pid}/fd/{_memory_descriptor(owner.pid, name)}", os.O_RDWR)
        owner.kill()
        owner.wait(TEST_S)
    ArenaTier(PAGE, name=name).close()
    os.close(descriptor)


def _memory_descriptor(pid: int, name: str) -> str:
    """One of a process's descriptors that lead to the arena; which one does not matter to a new open of it."""
    folder = Path(f"/proc/{pid}/fd")
    return next(
        each.name for each in folder.iterdir() if f"kvstore-{name}" in os.readlink(each) or "#" in os.readlink(each)
    )


@pytest.mark.parametrize("content", [b"", b"mine", b"KVARENB\0" + bytes(4096)])
def test_files_of_others_are_not_touched(name: str, content: bytes) -> None:
    Path(path_of(name)).write_bytes(content)
    try:
        with leaves_nothing(), pytest.raises(ArenaError, match="is not an arena of kvstore; remove it"):
            ArenaTier(PAGE, name=name)
        assert Path(path_of(name)).read_bytes() == content
    finally:
        os.unlink(path_of(name))


def test_one_of_many_gets_the_name(name: str) -> None:
    """Remains are there, and several processes begin at once: one owns the name, the others are refused."""
    with script(OWNER, name) as owner:
        owner.kill()
        owner.wait(TEST_S)
    contender = """
from kvstore.errors import ArenaError
print("ready", flush=True)
sys.stdin.readline()
try:
    tier = ArenaTier(1 << 20, name=sys.argv[1])
    print("owner", flush=True)
except ArenaError as error:
    print("refused" if "owned by process" in str(error) else error, flush=True)
sys.stdin.readline()
"""
    with script(contender, name) as a, script(contender, name) as b, script(contender, name) as c:
        contenders = (a, b, c)
        for each in contenders:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        answers = [each.stdout.readline().strip() for each in contenders if each.stdout is not None]
        assert sorted(answers) == ["owner", "refused", "refused"]
    ArenaTier(PAGE, name=name).close()


# Fork


FORKING_OWNER = """
from kvstore.errors import StoreClosedError, StaleSlotError
named = ArenaTier(1 << 20, name=sys.argv[1])
unnamed = ArenaTier(1 << 20)
slot = named.allocate(4096)
named.view(slot)[:6] = b"shared"
view = named.view(slot)
if os.fork() == 0:
    seen = []
    for tier in (named, unnamed):
        uses = lambda: tier.allocate(4096), lambda: tier.descriptor, lambda: tier.free(slot), lambda: tier.view(slot)
        for use in uses:
            try:
                use()
            except StoreClosedError as error:
                seen.append("forked" in str(error) or "closed" in str(error))
        seen.append(tier.used_bytes == 0)
    open_files = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{each}")]
    seen.append(not any("kvstore" in each or "memfd" in each for each in open_files))
    seen.append(bytes(view[:6]) == b"shared")
    named.close()
    seen.append(os.path.exists(named.path))
    sys.stdout.write("ready\\n" if all(seen) and len(seen) == 13 else f"{seen}\\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)
os.wait()
"""


def test_a_forked_child_uses_nothing_and_owns_nothing(name: str) -> None:
    """A lock on an open file is shared by fork; a child that lives on must not keep the name of a dead owner."""
    with script(FORKING_OWNER, name) as owner:
        with pytest.raises(ArenaError, match=f"owned by process {owner.pid}"):
            ArenaTier(PAGE, name=name)
        owner.kill()
        owner.wait(TEST_S)
        # The child still runs: it waits for the end of its input.
        ArenaTier(PAGE, name=name).close()


# Little room


IN_LITTLE_ROOM = """
import threading
from kvstore.errors import ArenaError
directory = sys.argv[1]

def opened(name, capacity_bytes):
    try:
        return ArenaTier(capacity_bytes, name=name, directory=directory)
    except ArenaError as error:
        return str(error)

message = opened("large", 64 << 20)
assert isinstance(message, str), message
for part in (directory + "/kvstore-large", str((64 << 20) + 4096), "are free", "memfd", "mount it larger"):
    assert part in message, (part, message)
assert os.listdir(directory) == []

small = opened("small", 1 << 20)
assert isinstance(small, ArenaTier), small
slot = small.allocate(1 << 20)
small.view(slot)[:] = b"x" * (1 << 20)
small.close()

# Both see enough room before they begin, and there is enough for one: never a signal, at most an error each.
for attempt in range(20):
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(opened(n, 5 << 20))) for n in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiers = [result for result in results if isinstance(result, ArenaTier)]
    assert len(results) == 2 and len(tiers) <= 1, results
    for tier in tiers:
        slot = tier.allocate(5 << 20)
        tier.view(slot)[:] = b"x" * (5 << 20)
        tier.close()
    del tiers, results
    assert os.listdir(directory) == []
print("ready", flush=True)
"""


def test_a_small_shm_is_an_error_at_open(tmp_path: Path) -> None:
    """As a container's /dev/shm of 64 MB: a file system of 8 MiB, mounted where only this test's child sees it."""
    mount = f"mount -t tmpfs -o size=8m tmpfs '{tmp_path}'"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, timeout=TEST_S).returncode != 0:
        pytest.skip("mounting a file system of its own is not permitted here")
    code = "import os, sys\nfrom kvstore.tiers import ArenaTier\n" + IN_LITTLE_ROOM
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1" "$2"', sys.executable, code, str(tmp_path)],
        capture_output=True, text=True, timeout=TEST_S, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr


# In a pool


def test_one_class_crowds_out_another_in_the_policys_order() -> None:
    """Long prompts fill the arena with blocks, then short ones need mostly states, then long ones again.

    The two lie in slabs of their own. Making room evicts the oldest prompts and no others, relocating what is
    scattered; what a lease holds stays, where it is.
    """
    heads = (Segment("heads", 2, 1),)
    keys = TensorSpec("keys", DType.FLOAT32, heads, (700,), has_tokens=True)
    recurrent = TensorSpec("recurrent", DType.FLOAT32, heads, (40, 100), has_tokens=False)
    groups = (
        CacheGroup("attention", ReuseRule.ATTENTION, (0, 1), (keys,)),
        CacheGroup("state", ReuseRule.STATE, (2,), (recurrent,)),
    )
    spec = ModelSpec("test-two-classes", "seed 0", 16, groups)
    sizes = slot_sizes_bytes(spec)
    assert len(sizes) == 2
    source = random.Random(0)
    with open_store(spec, dram=7 << 20) as store:
        tier = store.pool._tier
        assert isinstance(tier, ArenaTier)
        prompts: list[list[int]] = []
        """As the policy ranks them: what was used last comes last."""
        leased = None
        for number in range(120):
            ids = [1000 * number + 1 + token for token in range(64)]
            # Blocks and one state each at first, a state at every block later, and back again.
            with store.write(ids, resume_at=range(16, 65, 16) if 40 <= number < 80 else None) as writer:
                put_all(writer)
                writer.commit()
            prompts.append(ids)
            store.pool.check()
            tier.check()
            there = [ids for ids in prompts if store.match([*ids, 0]).tokens == 64]
            assert there, "what was written last is there"
            evicted_in_order = [ids for ids in there if leased is None or ids is not leased[0]]
            assert evicted_in_order == [ids for ids in prompts[-len(there) :] if ids in evicted_in_order]
            if number == 45:
                leased = ids, store.read(store.match([*ids, 0]))
            elif source.random() < 0.7:
                used = source.choice(there)
                with store.read(store.match([*used, 0])) as lease:
                    assert lease.verify() == []
                prompts.remove(used)
                prompts.append(used)
        assert leased is not None
        check_lease(leased[1], store.prompt(leased[0]))
        leased[1].release()
        assert tier.statistics().relocated_bytes > 0
        assert store.statistics().evicted_records > 0
