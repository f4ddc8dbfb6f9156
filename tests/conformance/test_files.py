"""The files of SSD directories against their kit."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from kvstore._native import file_engines
from kvstore.testing.files import FilesConformance
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.testing.forgetful_files import ForgetfulFiles
from kvstore.tiers.ssd.direct_files import DirectFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc.files import Files


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
