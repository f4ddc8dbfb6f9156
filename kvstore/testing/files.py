"""Conformance kit for `kvstore.abc.files.Files`.

A test module of the implementer's own:

    class TestMine(FilesConformance):
        @pytest.fixture
        def files(self):
            with closing(MyFiles(...)) as files:
                yield files

        def peek(self, files, name):
            return the bytes of a file, found in another way than through `files`

`peek` goes round the files, so that they are not their own oracle; without it they are read through `files`.
"""

from __future__ import annotations

import errno
import mmap
import random
import select
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.abc.files import FileOperation, Files
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, StoreClosedError
from kvstore.limits import FILE_ALIGN_BYTES
from kvstore.testing.resources import Background, leaves_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from kvstore.abc.files import FileBatch

PAGE = FILE_ALIGN_BYTES
TEST_S = 30.0
"""No single step of the kit takes longer, also on a slow and busy machine."""
READ, WRITE, SYNC = FileOperation.READ, FileOperation.WRITE, FileOperation.SYNC


class Memory:
    """Aligned memory of some pages, as bytes and by address."""

    def __init__(self, size_bytes: int) -> None:
        self._mapping = mmap.mmap(-1, size_bytes)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)

    def address(self, offset: int = 0) -> int:
        return int(self.array.ctypes.data) + offset

    def fill(self, seed: int) -> Memory:
        self.array[:] = np.random.default_rng(seed).integers(0, 256, len(self.array), np.uint8)
        return self

    def bytes(self, begin: int = 0, size: int | None = None) -> bytes:
        return self.array[begin : None if size is None else begin + size].tobytes()


def rows(*operations: tuple[int, int, int, int, int]) -> npt.NDArray[np.uint64]:
    """Operations as `Files.submit` takes them."""
    return np.array(operations, np.uint64).reshape(-1, 5)


def sync(file: int) -> tuple[int, int, int, int, int]:
    return (SYNC, file, 0, 0, 0)


def run(files: Files, operations: Sequence[tuple[int, int, int, int, int]], *, is_urgent: bool = False) -> FileBatch:
    """Submit, wait for all; the batch."""
    batch = files.submit(rows(*operations), is_urgent=is_urgent)
    assert sorted(batch.wait(len(operations), Deadline.after(TEST_S))) == list(range(len(operations)))
    return batch


def run_well(files: Files, operations: Sequence[tuple[int, int, int, int, int]]) -> None:
    """Submit, wait for all; none may fail."""
    assert run(files, operations).errors() == {}


def file_of(files: Files, name: str, content: Memory) -> int:
    """A new file with this content."""
    file = files.create(name)
    run_well(files, [(WRITE, file, 0, content.address(), len(content.array))])
    return file


def is_readable(descriptor: int, within_s: float) -> bool:
    return bool(select.select([descriptor], [], [], within_s)[0])


class FilesConformance:
    """The cases; a subclass gives the files of an empty directory."""

    @pytest.fixture
    def files(self) -> Iterator[Files]:
        """The files under test."""
        raise NotImplementedError("override the fixture `files`")

    def peek(self, files: Files, name: str) -> bytes:
        """The bytes of a file, not through `files` where there is another way."""
        file = files.open(name)
        size = files.size(file)
        into = Memory(max(PAGE, size))
        run_well(files, [(READ, file, 0, into.address(), size)] if size else [])
        files.close_file(file)
        return into.bytes(0, size)

    @pytest.fixture(autouse=True)
    def _leaves_nothing(self) -> Iterator[None]:
        with leaves_nothing():
            yield

    # Names

    def test_begins_empty(self, files: Files) -> None:
        assert files.names() == {}
        assert files.directory
        assert files.engine
        assert files.free_bytes() > 0

    def test_names_and_sizes(self, files: Files) -> None:
        content = Memory(3 * PAGE).fill(1)
        first = files.create("first")
        second = file_of(files, "second", content)
        assert first != second
        assert files.names() == {"first": 0, "second": 3 * PAGE}
        assert (files.size(first), files.size(second)) == (0, 3 * PAGE)
        files.sync_names()
        files.close_file(first)
        files.close_file(second)
        assert files.names() == {"first": 0, "second": 3 * PAGE}

    def test_a_name_is_given_once(self, files: Files) -> None:
        content = Memory(PAGE).fill(1)
        file_of(files, "taken", content)
        with pytest.raises(FileExistsError, match="taken"):
            files.create("taken")
        assert self.peek(files, "taken") == content.bytes()

    def test_what_is_not_there(self, files: Files) -> None:
        for call in (files.open, files.remove):
            with pytest.raises(FileNotFoundError, match="absent"):
                call("absent")

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "../outside", "nul\0"])
    def test_names_that_lead_elsewhere(self, files: Files, name: str) -> None:
        calls: tuple[Callable[[str], object], ...] = (files.create, files.open, files.remove)
        for call in calls:
            with pytest.raises(ValueError, match="name"):
                call(name)

    def test_a_removed_file_stays_with_who_has_it(self, files: Files) -> None:
        content, into = Memory(PAGE).fill(1), Memory(PAGE)
        file = file_of(files, "gone", content)
        files.remove("gone")
        files.sync_names()
        assert files.names() == {}
        run_well(files, [(READ, file, 0, into.address(), PAGE)])
        assert into.bytes() == content.bytes()
        again = files.create("gone")
        assert files.size(again) == 0
        assert files.size(file) == PAGE

    def test_files_at_rest_are_read_as_ever(self, files: Files) -> None:
        contents = [Memory(PAGE).fill(number) for number in range(5)]
        opened = [file_of(files, f"file {number}", content) for number, content in enumerate(contents)]
        run_well(files, [sync(file) for file in opened])
        for file in opened:
            files.rest(file)
        for _ in range(2):
            intos = [Memory(PAGE) for _ in opened]
            run_well(files, [(READ, file, 0, into.address(), PAGE) for file, into in zip(opened, intos, strict=True)])
            assert [into.bytes() for into in intos] == [content.bytes() for content in contents]
        assert [files.size(file) for file in opened] == [PAGE] * 5
        files.remove("file 2")
        for file in opened:
            files.close_file(file)

    def test_numbers_of_closed_files_are_refused(self, files: Files) -> None:
        file = files.create("file")
        files.close_file(file)
        calls: tuple[Callable[[int], object], ...] = (
            files.size,
            files.close_file,
            lambda number: files.truncate(number, 0),
            lambda number: files.submit(rows(sync(number))),
        )
        files.create("another")  # which must not get the same number
        for call in calls:
            with pytest.raises(ValueError, match=str(file)):
                call(file)

    def test_truncate(self, files: Files) -> None:
        content = Memory(4 * PAGE).fill(1)
        file = file_of(files, "file", content)
        files.truncate(file, PAGE + 10)
        assert files.size(file) == PAGE + 10
        assert self.peek(files, "file")[: PAGE + 10] == content.bytes(0, PAGE + 10)
        files.truncate(file, 3 * PAGE)
        assert self.peek(files, "file") == content.bytes(0, PAGE + 10) + bytes(2 * PAGE - 10)
        run_well(files, [sync(file)])

    def test_a_file_open_for_reading_is_not_changed(self, files: Files) -> None:
        content = Memory(PAGE).fill(1)
        files.close_file(file_of(files, "file", content))
        file = files.open("file")
        other = Memory(PAGE).fill(2)
        batch = run(files, [(WRITE, file, 0, other.address(), PAGE)])
        assert list(batch.errors()) == [0]
        with pytest.raises(OSError, match="file"):
            files.truncate(file, 0)
        assert self.peek(files, "file") == content.bytes()
        files.close_file(file)
        file = files.open("file", may_write=True)
        run_well(files, [(WRITE, file, 0, other.address(), PAGE)])
        assert self.peek(files, "file") == other.bytes()

    # Bytes

    @pytest.mark.parametrize("pages", [1, 2, 33, 255, 256, 257, 1024, 2100])
    def test_what_is_written_is_read(self, files: Files, pages: int) -> None:
        content, into = Memory(pages * PAGE).fill(pages), Memory(pages * PAGE)
        file = file_of(files, "file", content)
        assert self.peek(files, "file") == content.bytes()
        run_well(files, [(READ, file, 0, into.address(), pages * PAGE)])
        assert into.bytes() == content.bytes()

    def test_many_scattered_operations(self, files: Files) -> None:
        """In one batch, over two files, each page to another place; then read back in another order."""
        count = 700
        content, into = Memory(count * PAGE).fill(1), Memory(count * PAGE)
        shuffled = random.Random(1)
        open_files = [files.create("even"), files.create("odd")]
        places = shuffled.sample(range(count), count)
        operations = [
            (WRITE, open_files[page % 2], place * PAGE, content.address(page * PAGE), PAGE)
            for page, place in enumerate(places)
        ]
        run_well(files, operations)
        run_well(files, [sync(file) for file in open_files])
        order = shuffled.sample(range(count), count)
        run_well(
            files,
            [(READ, open_files[page % 2], places[page] * PAGE, into.address(page * PAGE), PAGE) for page in order],
        )
        assert into.bytes() == content.bytes()
        for parity, name in enumerate(("even", "odd")):
            seen = self.peek(files, name)
            for page in range(parity, count, 2):
                begin = places[page] * PAGE
                assert seen[begin : begin + PAGE] == content.bytes(page * PAGE, PAGE)

    def test_a_hole_reads_as_zeros(self, files: Files) -> None:
        content, into = Memory(PAGE).fill(1), Memory(4 * PAGE).fill(2)
        file = files.create("file")
        run_well(files, [(WRITE, file, 3 * PAGE, content.address(), PAGE)])
        run_well(files, [(READ, file, 0, into.address(), 4 * PAGE)])
        assert into.bytes() == bytes(3 * PAGE) + content.bytes()

    def test_written_over(self, files: Files) -> None:
        content, other = Memory(3 * PAGE).fill(1), Memory(PAGE).fill(2)
        file = file_of(files, "file", content)
        run_well(files, [(WRITE, file, PAGE, other.address(), PAGE)])
        assert self.peek(files, "file") == content.bytes(0, PAGE) + other.bytes() + content.bytes(2 * PAGE)

    def test_nothing_beside_the_range_is_written(self, files: Files) -> None:
        content, into = Memory(3 * PAGE).fill(1), Memory(3 * PAGE).fill(2)
        before = into.bytes()
        file = file_of(files, "file", content)
        run_well(files, [(READ, file, PAGE, into.address(PAGE), PAGE)])
        assert into.bytes() == before[:PAGE] + content.bytes(PAGE, PAGE) + before[2 * PAGE :]

    # Errors

    def test_a_read_past_the_end_is_an_error(self, files: Files) -> None:
        content, into = Memory(2 * PAGE).fill(1), Memory(600 * PAGE)
        file = file_of(files, "file", content)
        batch = run(
            files,
            [
                (READ, file, 0, into.address(), PAGE),
                (READ, file, PAGE, into.address(PAGE), 2 * PAGE),
                (READ, file, 5 * PAGE, into.address(4 * PAGE), PAGE),
                (READ, file, 0, into.address(8 * PAGE), 590 * PAGE),
                (READ, file, PAGE, into.address(5 * PAGE), PAGE),
            ],
        )
        assert sorted(batch.errors()) == [1, 2, 3]
        assert {error.errno for error in batch.errors().values()} == {errno.EIO}
        assert into.bytes(0, PAGE) == content.bytes(0, PAGE)
        assert into.bytes(5 * PAGE, PAGE) == content.bytes(PAGE, PAGE)

    def test_a_file_that_ends_within_a_page(self, files: Files) -> None:
        content, into = Memory(2 * PAGE).fill(1), Memory(2 * PAGE)
        file = file_of(files, "file", content)
        files.truncate(file, PAGE + 100)
        batch = run(files, [(READ, file, 0, into.address(), 2 * PAGE), (READ, file, 0, into.address(), PAGE)])
        assert {number: error.errno for number, error in batch.errors().items()} == {0: errno.EIO}
        assert into.bytes(0, PAGE) == content.bytes(0, PAGE)

    @pytest.mark.parametrize(
        ("change", "to"),
        [((0, 0), 3), ((0, 0), 1 << 40), ((0, 1), 1 << 40), ((0, 2), 100), ((0, 3), 8), ((0, 4), 100), ((0, 4), 0),
         ((0, 3), 0), ((0, 2), (1 << 63) - PAGE), ((0, 2), (1 << 64) - PAGE)],
    )  # fmt: skip
    def test_rows_that_are_none(self, files: Files, change: tuple[int, int], to: int) -> None:
        content, other = Memory(PAGE).fill(1), Memory(PAGE).fill(2)
        file = file_of(files, "file", content)
        good = (WRITE, file, 0, other.address(), PAGE)
        operations = rows(good, good)[::-1].copy()
        operations[change] = to
        with pytest.raises(ValueError, match=r"\d"):
            files.submit(operations)
        assert self.peek(files, "file") == content.bytes()

    def test_arrays_that_are_none(self, files: Files) -> None:
        file = files.create("file")
        for wrong in (np.zeros((1, 4), np.uint64), np.zeros(5, np.uint64), np.zeros((1, 5), np.float64)):
            with pytest.raises((ValueError, TypeError), match="5"):
                files.submit(wrong)  # type: ignore[arg-type]
        run_well(files, [sync(file)])

    # Batches

    def test_a_batch_of_nothing_has_ended(self, files: Files) -> None:
        batch = files.submit(rows())
        assert is_readable(batch.descriptor, 0)
        assert len(batch.wait(0, Deadline.after(0))) == 0
        batch.cancel()

    def test_wait_counts(self, files: Files) -> None:
        content = Memory(64 * PAGE).fill(1)
        file = file_of(files, "file", content)
        into = Memory(64 * PAGE)
        batch = files.submit(rows(*((READ, file, page * PAGE, into.address(page * PAGE), PAGE) for page in range(64))))
        seen: list[int] = []
        for count in (1, 10, 40, 64):
            ended = batch.wait(count, Deadline.after(TEST_S)).tolist()
            assert len(ended) >= count
            assert ended[: len(seen)] == seen, "the order in which they ended does not change"
            for page in ended:
                assert into.bytes(page * PAGE, PAGE) == content.bytes(page * PAGE, PAGE)
            seen = ended
        assert sorted(seen) == list(range(64))
        assert is_readable(batch.descriptor, TEST_S)
        with pytest.raises(ValueError, match="65"):
            batch.wait(65, Deadline.after(0))

    def test_the_descriptor_tells_the_end(self, files: Files) -> None:
        content = Memory(256 * PAGE).fill(1)
        file = files.create("file")
        batch = files.submit(rows((WRITE, file, 0, content.address(), 256 * PAGE), sync(file)))
        assert is_readable(batch.descriptor, TEST_S)
        assert len(batch.wait(2, Deadline.after(0))) == 2
        assert is_readable(batch.descriptor, 0), "it stays so"

    def test_cancel(self, files: Files) -> None:
        """Each operation either did all of its work or ends with ECANCELED; all end."""
        count, size = 400, 16 * PAGE
        content = Memory(size).fill(1)
        file = files.create("file")
        files.truncate(file, count * size)
        batch = files.submit(rows(*((WRITE, file, at * size, content.address(), size) for at in range(count))))
        batch.cancel()
        batch.cancel()
        assert sorted(batch.wait(count, Deadline.after(TEST_S))) == list(range(count))
        assert is_readable(batch.descriptor, TEST_S)
        assert {error.errno for error in batch.errors().values()} <= {errno.ECANCELED}
        seen = self.peek(files, "file")
        for at in range(count):
            if at not in batch.errors():
                assert seen[at * size : (at + 1) * size] == content.bytes()
        run_well(files, [(WRITE, file, 0, content.address(), size)])

    def test_urgent_ones_do_the_same(self, files: Files) -> None:
        content, into = Memory(64 * PAGE).fill(1), Memory(64 * PAGE)
        file = file_of(files, "file", content)
        backlog = files.submit(rows(*((WRITE, file, 64 * PAGE, content.address(), 64 * PAGE) for _ in range(50))))
        urgent = run(files, [(READ, file, 0, into.address(), 64 * PAGE)], is_urgent=True)
        assert urgent.errors() == {}
        assert into.bytes() == content.bytes()
        assert len(backlog.wait(50, Deadline.after(TEST_S))) == 50
        assert backlog.errors() == {}

    def test_many_threads(self, files: Files) -> None:
        """Each with a file of its own, writing, syncing, reading."""

        def work(number: int) -> bool:
            content, into = Memory(40 * PAGE).fill(number), Memory(40 * PAGE)
            file = files.create(f"file-{number}")
            for first in range(0, 40, 10):
                run_well(
                    files,
                    [
                        (WRITE, file, page * PAGE, content.address(page * PAGE), PAGE)
                        for page in range(first, first + 10)
                    ],
                )
                run_well(files, [sync(file)])
            run_well(files, [(READ, file, 0, into.address(), 40 * PAGE)])
            files.close_file(file)
            return into.bytes() == content.bytes()

        threads = [Background(partial(work, number)) for number in range(6)]
        assert all(thread.result(TEST_S) for thread in threads)
        assert files.names() == {f"file-{number}": 40 * PAGE for number in range(6)}

    def test_batches_outlive_nothing_of_theirs(self, files: Files) -> None:
        """Batches nobody waits for end as well, and leave nothing behind."""
        content = Memory(8 * PAGE).fill(1)
        file = files.create("file")
        for at in range(30):
            files.submit(rows((WRITE, file, at * 8 * PAGE, content.address(), 8 * PAGE)))
        files.close()

    # Ends

    def test_close(self, files: Files) -> None:
        content = Memory(64 * PAGE).fill(1)
        file = files.create("file")
        batch = files.submit(rows(*((WRITE, file, 0, content.address(), 64 * PAGE) for _ in range(40))))
        files.close()
        files.close()
        assert len(batch.wait(40, Deadline.after(TEST_S))) == 40
        assert {error.errno for error in batch.errors().values()} <= {errno.ECANCELED}
        assert is_readable(batch.descriptor, TEST_S)
        batch.cancel()
        calls: tuple[Callable[[], object], ...] = (
            files.names,
            lambda: files.create("new"),
            lambda: files.open("file"),
            lambda: files.size(file),
            lambda: files.remove("file"),
            files.sync_names,
            lambda: files.submit(rows(sync(file))),
        )
        for call in calls:
            with pytest.raises(StoreClosedError, match="closed"):
                call()

    def test_a_wait_that_takes_too_long(self, files: Files) -> None:
        content = Memory(64 * PAGE).fill(1)
        file = files.create("file")
        batch = files.submit(rows(*((WRITE, file, 0, content.address(), 64 * PAGE) for _ in range(40)), sync(file)))
        try:
            batch.wait(41, Deadline.after(0))
        except DeadlineError as error:
            assert files.directory in str(error)  # noqa: PT017 - both outcomes are right, the message is what is checked
        assert len(batch.wait(41, Deadline.after(TEST_S))) == 41
        assert batch.errors() == {}
