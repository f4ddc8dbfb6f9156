"""The files of SSD directories against their kit."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.testing.files import FilesConformance
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.testing.forgetful_files import ForgetfulFiles

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
