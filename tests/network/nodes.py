"""Nodes in processes of their own, on the hosts of an emulated link or on this one; and what every test checks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tests.network.link import ADDRESSES, ANSWER_S, Host, Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

ROOT = Path(__file__).parents[2]
WITHIN_S = 60.0
"""No test waits longer for anything, also on a slow and busy machine."""
PORT = 7000
"""Every host has its ports to itself."""


class Hosts(Protocol):
    """What joins two hosts."""

    def command(self, host: Host, *words: str) -> list[str]: ...


class Node:
    """A node of ours in a process; a context manager.

    Args:
        link: on whose host it runs; without one, here. Wires will do as well.
        arguments: of `node.Node`.
    """

    def __init__(self, link: Hosts | None = None, host: Host = "a", **arguments: Any) -> None:
        command = [sys.executable, "-m", "tests.network.node", json.dumps(arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._lines = Lines(command if link is None else link.command(host, *command), cwd=ROOT, env=environment)
        self._host_address = ADDRESSES[host] if link is not None else "127.0.0.1"
        self.is_local = link is None
        self.address = ""
        self._is_ready = False

    @property
    def pid(self) -> int:
        return self._lines.pid

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, command: str, answer_s: float = ANSWER_S, **words: Any) -> dict[str, Any]:
        if not self._is_ready:
            # Not before it is needed, so that several start at a time.
            self._lines.answer(WITHIN_S)
            self._is_ready = True
        answer: dict[str, Any] = json.loads(self._lines.ask(json.dumps({"do": command, **words}), answer_s))
        return answer

    def listen(self, port: int = PORT, hosts: Sequence[str] = ()) -> str:
        """Receive; where. A node on this host takes any free port. `hosts`: other addresses of its own."""
        port = 0 if self.is_local else port
        listed = ",".join(f"{host}:{port}" for host in hosts or [self._host_address])
        self.address = str(self._do("listen", address=f"tcp://{listed}")["address"])
        return self.address

    def put(self, seed: int, tokens: int) -> int:
        """Have a prompt; the bytes that cross when the other side has nothing of it."""
        return int(self._do("put", seed=seed, tokens=tokens)["bytes"])

    def send(self, to: str, seed: int, tokens: int, name: str = "one", **options: Any) -> None:
        answer = self._do("send", name=name, to=to, seed=seed, tokens=tokens, **options)
        assert not answer, answer

    def wait(self, name: str = "one", within_s: float = WITHIN_S) -> dict[str, Any]:
        """How a transfer ended; it must have."""
        outcome = self._do("wait", within_s + ANSWER_S, name=name, within_s=within_s)
        assert "running" not in outcome, f"transfer {name} has not ended within {within_s:g} s"
        return outcome

    def cancel(self, name: str = "one") -> None:
        self._do("cancel", name=name)

    def digest(self, seed: int, tokens: int) -> tuple[int, str]:
        found = self._do("digest", WITHIN_S, seed=seed, tokens=tokens)
        return int(found["tokens"]), str(found["digest"])

    def evict(self, seed: int, tokens: int) -> int:
        return int(self._do("evict", seed=seed, tokens=tokens)["bytes"])

    def state(self) -> dict[str, Any]:
        return self._do("state")

    def kill(self) -> None:
        """End it without a word: SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self._lines.process.wait(ANSWER_S)

    def stop(self) -> None:
        """Stop it: it takes part in nothing, and its kernel goes on acknowledging for it."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self._lines.close()


def wait_until(condition: Callable[[], bool], what: str, within_s: float = WITHIN_S) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"it took more than {within_s:g} s until {what}"
        time.sleep(0.01)


def wait_for_bytes(receiver: Node, size_bytes: int) -> None:
    """Until a receiver has so many bytes in all."""
    wait_until(lambda: receiver.state()["received_bytes"] >= size_bytes, f"{size_bytes} bytes had arrived")


def held_by(node: Node) -> dict[str, Any]:
    """What a node has not given back."""
    state = node.state()
    assert state["damaged_records"] == 0
    names = ("reserved_bytes", "quarantined_bytes", "transfers", "connections", "sending")
    return {name: state[name] for name in names if state[name]}


def assert_settled(*nodes: Node, within_s: float = WITHIN_S) -> None:
    """Nothing is reserved, quarantined, being sent or received, and no connection is open."""
    until_s = time.monotonic() + within_s
    for node in nodes:
        while held := held_by(node):
            assert time.monotonic() < until_s, f"after {within_s:g} s a node still holds {held}"
            time.sleep(0.01)


def assert_same(source: Node, target: Node, seed: int, tokens: int) -> None:
    """A prompt is there, whole and bit for bit the same."""
    ours, theirs = source.digest(seed, tokens), target.digest(seed, tokens)
    assert ours[0] == tokens
    assert theirs == ours


def assert_absent(target: Node, seed: int, tokens: int) -> None:
    """Nothing of a prompt is visible."""
    assert target.digest(seed, tokens) == (0, "")


def assert_whole_or_absent(source: Node, target: Node, seed: int, tokens: int) -> bool:
    """Whether it is there; never in part."""
    theirs = target.digest(seed, tokens)
    assert theirs in ((0, ""), source.digest(seed, tokens)), f"seed {seed}: {theirs[0]} of {tokens} tokens"
    return bool(theirs[0])
