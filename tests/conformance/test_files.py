"""The files of SSD directories against their kit, and the kit against files: each defect must fail the case named."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from kvstore._native import file_engines
from kvstore.abc.files import FileOperation
from kvstore.testing.files import FilesConformance
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.testing.forgetful_files import ForgetfulFiles
from kvstore.tiers.ssd.direct_files import DirectFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from kvstore.abc.files import FileBatch, Files


class TestForgetful(FilesConformance):
    @pytest.fixture
    def files(self) -> Iterator[Files]:
        with closing(ForgetfulDisk(seed=1).files()) as files:
            yield files

    def peek(self, files: Files, name: str) -> bytes:
        assert isinstance(files, ForgetfulFiles)
        return files.disk.peek(name)


class OnDisk(FilesConformance):
    """Of a directory, looked at by ordinary reads."""

    engine: ClassVar[str]

    @pytest.fixture
    def files(self, tmp_path: Path) -> Iterator[Files]:
        with closing(DirectFiles(str(tmp_path), engine=self.engine)) as files:
            yield files

    def peek(self, files: Files, name: str) -> bytes:
        return (Path(files.directory) / name).read_bytes()

    def test_it_is_the_engine_asked_for(self, files: Files) -> None:
        assert files.engine.partition(",")[0] == self.engine


class TestThreads(OnDisk):
    engine = "threads"


@pytest.mark.skipif(bool(dict(file_engines(4))["io_uring"]), reason=dict(file_engines(4))["io_uring"] or "it runs")
class TestRing(OnDisk):
    engine = "io_uring"


del OnDisk


class ShortReadsPass(ForgetfulFiles):
    """The end of a file is no error."""

    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        batch = super().submit(operations, is_urgent=is_urgent)
        batch.errors = dict  # type: ignore[method-assign]
        return batch


class NumbersComeAgain(ForgetfulFiles):
    def close_file(self, file: int) -> None:
        super().close_file(file)
        self._next = file


class LooksAtTheFirstRow(ForgetfulFiles):
    """Rows after it are not checked before it begins."""

    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        batch = super().submit(operations[:1], is_urgent=is_urgent)
        return super().submit(operations[1:], is_urgent=is_urgent) if len(operations) > 1 else batch


class WritesAll(ForgetfulFiles):
    """Files that were opened for reading are written, too."""

    def open(self, name: str, *, may_write: bool = False) -> int:
        return super().open(name, may_write=True)


class GoesAnywhere(ForgetfulFiles):
    def create(self, name: str) -> int:
        return super().create(name.replace("/", "_").replace("..", "up") or "none")


class TakesNames(ForgetfulFiles):
    """`create` replaces what is there."""

    def create(self, name: str) -> int:
        if name in self.names():
            self.remove(name)
        return super().create(name)


class ForgetsTheLast(ForgetfulFiles):
    """The last row of a batch has ended and was not done."""

    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        rows = operations.copy()
        if len(rows) > 1:
            rows[-1] = (FileOperation.SYNC, rows[-1, 1], 0, 0, 0)
        return super().submit(rows, is_urgent=is_urgent)


class StaysOpen(ForgetfulFiles):
    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "case"),
    [
        (ShortReadsPass, FilesConformance.test_a_read_past_the_end_is_an_error),
        (ShortReadsPass, FilesConformance.test_a_file_that_ends_within_a_page),
        (NumbersComeAgain, FilesConformance.test_numbers_of_closed_files_are_refused),
        (WritesAll, FilesConformance.test_a_file_open_for_reading_is_not_changed),
        (TakesNames, FilesConformance.test_a_name_is_given_once),
        (ForgetsTheLast, FilesConformance.test_many_scattered_operations),
        (ForgetsTheLast, FilesConformance.test_wait_counts),
        (StaysOpen, FilesConformance.test_close),
        (LooksAtTheFirstRow, lambda kit, files: kit.test_rows_that_are_none(files, (1, 0), 3)),
        (GoesAnywhere, lambda kit, files: kit.test_names_that_lead_elsewhere(files, "a/b")),
    ],
)
def test_the_kit_notices(
    broken: Callable[[ForgetfulDisk], Files], case: Callable[[FilesConformance, Files], None]
) -> None:
    kit = FilesConformance()
    case(kit, ForgetfulFiles(ForgetfulDisk(seed=1)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        case(kit, broken(ForgetfulDisk(seed=1)))
