"""A worker process for tests: commands as JSON lines on standard input, answers on standard output.

    python -m tests.attached.program SOCKET DEADLINE_S

Imports nothing but kvstore, so that it starts quickly. `tests.attached.driver` is its other end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import kvstore
from kvstore.attached import AttachedPool
from kvstore.pool import HandOver
from kvstore.spec import Shard
from kvstore.testing.specs import check_lease, put_all

if TYPE_CHECKING:
    from kvstore.handle import Handle
    from kvstore.store import Lease, Writer


class Program:
    """One attached store, one writer and one lease at a time."""

    def __init__(self, path: str, deadline_s: float) -> None:
        self.store = kvstore.attach(path, deadline_s=deadline_s)
        self.writer: Writer | None = None
        self.lease: Lease | None = None
        self.waiting: Handle[None] | None = None

    def begin(
        self,
        ids: list[int],
        shard: tuple[int, int] = (0, 1),
        joint: str | None = None,
        resume_at: list[int] | None = None,
        salt: str = "",
    ) -> int:
        """Reserve; the bytes reserved."""
        prompt = self.store.prompt(ids, salt=salt.encode())
        self.writer = self.store.write(prompt, shard=Shard(*shard), joint=joint, resume_at=resume_at)
        return self.writer.size_bytes

    def put(self) -> None:
        assert self.writer is not None
        put_all(self.writer)

    def commit(self, deadline_s: float = 60.0, first_token: int | None = None) -> None:
        assert self.writer is not None
        self.writer.commit(handover=None if first_token is None else HandOver(first_token), deadline_s=deadline_s)

    def abort(self) -> None:
        assert self.writer is not None
        self.writer.abort("the test wants it so")

    def write(self, ids: list[int], **options: Any) -> None:
        self.begin(ids, **options)
        self.put()
        self.commit()

    def write_forever(self, prompts: list[list[int]]) -> None:
        """Until killed: one line of output per commit."""
        while True:
            for number, ids in enumerate(prompts):
                try:
                    self.write(ids)
                except kvstore.KVStoreError as error:
                    print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
                    return
                print(json.dumps({"ok": number}), flush=True)

    def match(self, ids: list[int], shard: tuple[int, int] = (0, 1), salt: str = "") -> list[int]:
        found = self.store.match(ids, shard=Shard(*shard), salt=salt.encode())
        return [found.tokens, found.pending_tokens]

    def read(self, ids: list[int], shard: tuple[int, int] = (0, 1), salt: str = "") -> int:
        """Hold the deepest resume point and compare all of it; its length."""
        match = self.store.match([*ids, 0], shard=Shard(*shard), salt=salt.encode())
        self.lease = self.store.read(match, verify=True)
        self.read_again(ids, salt)
        return self.lease.tokens

    def read_again(self, ids: list[int], salt: str = "") -> None:
        assert self.lease is not None
        check_lease(self.lease, self.store.prompt(ids[: self.lease.tokens], salt=salt.encode()))

    def release(self) -> None:
        assert self.lease is not None
        self.lease.release()

    def accept(self, ids: list[int], deadline_s: float) -> int:
        """The first token of the hand-over that arrives."""
        arrival = self.store.accept(ids).result(deadline_s)
        with arrival.lease as lease:
            check_lease(lease, self.store.prompt(ids))
        return arrival.handover.first_token

    def move(self) -> None:
        """Pretend that bytes move in the writer's slots, and never end that."""
        assert self.writer is not None
        self.writer.transaction.moving().__enter__()

    def break_connection(self) -> None:
        """What a bug in some other library does: it shuts a socket that is not its own."""
        pool = self.store.pool
        assert isinstance(pool, AttachedPool)
        pool._connection._socket.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Lose everything without ending it."""
        self.writer = self.lease = None

    def is_closed(self) -> bool:
        return self.store.is_closed

    def statistics(self) -> dict[str, int]:
        found = self.store.statistics()
        return {"reserved": found.reserved_bytes, "quarantined": found.quarantined_bytes}

    def fork(self, ids: list[int]) -> list[object]:
        """What a forked child sees of the store, and whether the parent's goes on."""
        assert self.lease is not None
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            answers: list[object] = [self.store.is_closed]
            for call in (lambda: self.store.match(ids), lambda: self.lease.layer(1)):
                try:
                    call()
                    answers.append("it worked")
                except kvstore.KVStoreError as error:
                    answers.append(type(error).__name__)
            self.lease.release()
            self.lease = None
            self.store.close()
            os.write(writer, json.dumps(answers).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            seen: list[object] = json.loads(pipe.read())
        os.waitpid(child, 0)
        self.read_again(ids)
        return [*seen, self.store.match(ids).tokens]

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def close(self) -> None:
        self.store.close()


def main() -> None:
    program = Program(sys.argv[1], float(sys.argv[2]))
    print(json.dumps({"ok": os.getpid()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = {"ok": getattr(program, name)(**command)}
        except (kvstore.KVStoreError, AssertionError) as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
