"""Which engine moves the bytes of files: io_uring where the kernel gives it, threads everywhere else."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore._native import FileEngine, choose_file_engine, file_engines
from kvstore.errors import UnavailableError
from kvstore.limits import FILE_DEPTH_DEFAULT, FILE_DEPTH_MAX, FILE_PIECE_BYTES, FILE_URGENT_DEPTH


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and why it is not a better one.

    Attributes:
        name: `io_uring` or `threads`.
        depth: pieces of files under way at once, urgent ones not counted.
        why_not_better: in words; empty for the best there is.
    """

    name: str
    depth: int
    why_not_better: str

    def start(self) -> FileEngine:
        """A new engine, for the files of one directory.

        Raises:
            OSError: the system does not give what it needs.
        """
        return FileEngine(self.name, self.depth, FILE_URGENT_DEPTH, FILE_PIECE_BYTES)


def choose_engine(name: str | None = None, *, depth: int = FILE_DEPTH_DEFAULT) -> EngineChoice:
    """The best engine that can run here, or the one named here or by the environment variable `KVSTORE_IO`.

    Raises:
        UnavailableError: the one that is named is unknown or cannot run here.
        ValueError: no engine has such a depth.
    """
    if not 1 <= depth <= FILE_DEPTH_MAX:
        raise ValueError(f"files have a depth from 1 to {FILE_DEPTH_MAX}, not {depth}")
    if name is not None:
        obstacles = dict(file_engines(depth + FILE_URGENT_DEPTH))
        if name not in obstacles:
            raise UnavailableError(
                f"there is no engine {name!r} of file I/O; name one of {', '.join(obstacles)}, or None"
            )
        if obstacles[name]:
            raise UnavailableError(f"the engine {name!r} of file I/O cannot run here: {obstacles[name]}; name none")
    try:
        chosen, why_not_better = choose_file_engine(depth + FILE_URGENT_DEPTH, name)
    except RuntimeError as error:
        raise UnavailableError(str(error)) from None
    return EngineChoice(chosen, depth, why_not_better)
