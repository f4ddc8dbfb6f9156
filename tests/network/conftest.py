"""Fixtures of the tests over emulated links. Where a link cannot be emulated they are skipped, and say why."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.network.link import Link, NoEmulatorError, Way, build_emulator
from tests.network.nodes import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator, compiled and tried."""
    try:
        program = build_emulator(tmp_path_factory.mktemp("emulator"))
        Link(program, Way()).close()
    except NoEmulatorError as error:
        pytest.skip(str(error))
    return program


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what a test has begun, also when it fails."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_link(emulator: Path, stack: ExitStack) -> Callable[..., Link]:
    """Makes links that end with the test; the arguments are those of `Link` without the program."""

    def make(way: Way, back: Way | None = None, *, mtu: int = 1500) -> Link:
        return stack.enter_context(Link(emulator, way, back, mtu=mtu))

    return make


@pytest.fixture
def make_node(stack: ExitStack) -> Callable[..., Node]:
    """Makes nodes that end with the test; the arguments are those of `Node`."""

    def make(*where: object, **arguments: object) -> Node:
        return stack.enter_context(Node(*where, **arguments))  # type: ignore[arg-type]

    return make
