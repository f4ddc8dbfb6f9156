"""Tensor-parallel ranks as processes of their own over one store: each its own heads, or all the same."""

from __future__ import annotations

import multiprocessing
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.adapters.sglang.position import Position
from kvstore.adapters.sglang.storage import Asked
from tests.unit.sglang_pools import (
    MambaPoolHost,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
    hashes,
    make_storage,
    slots_of,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

PAGES = 6
RANKS = 2
DEADLINE_S = 60
STATE = Asked("mamba", "trailing_pages", 1)


def rank_process(rank: int, socket: str, is_replicated: bool, connection: Connection) -> None:
    """Does what it is told over the pipe, as a scheduler's storage threads would."""
    pool: Any = MLATokenToKVPoolHost() if is_replicated else MHATokenToKVPoolHost()
    states, keys = MambaPoolHost(), hashes(PAGES)
    pool.fill(100 if is_replicated else 100 + rank)
    states.fill(200 + rank)
    expected = [pool.page_bytes(page) for page in range(PAGES)], states.page_bytes(0)
    position = Position(tp_rank=rank, tp_size=RANKS, is_replicated=is_replicated)
    with closing(make_storage(("kv", pool), ("mamba", states), position=position, own_socket=socket)) as storage:
        connection.send("ready")
        while (order := connection.recv()) != "close":
            if order == "write states":
                answer: Any = storage.write("mamba", keys[-1:], slots_of([0], 1))
            elif order == "write pages":
                answer = storage.write("kv", keys, slots_of(list(range(PAGES))))
            elif order == "ask":
                answer = storage.restorable(keys, [STATE]).lengths
            else:
                pool.zero()
                states.zero()
                came = storage.read("kv", keys, slots_of(list(range(10, 10 + PAGES))))
                came += storage.read("mamba", keys[-1:], slots_of([7], 1))
                are_same = [pool.page_bytes(10 + page) for page in range(PAGES)], states.page_bytes(7)
                answer = all(came) and are_same == expected
            connection.send(answer)
    connection.send("closed")


class Ranks:
    """The processes, and orders for all of them."""

    def __init__(self, socket: str, *, is_replicated: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes, self.connections = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=rank_process, args=(rank, socket, is_replicated, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def take(self, rank: int) -> Any:
        assert self.connections[rank].poll(DEADLINE_S), f"rank {rank} does not answer"
        return self.connections[rank].recv()

    def order(self, what: str, *ranks: int) -> list[Any]:
        for rank in ranks:
            self.connections[rank].send(what)
        return [self.take(rank) for rank in ranks]

    def end(self) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.kill()
            process.join(DEADLINE_S)
            connection.close()


@pytest.mark.parametrize("is_replicated", [False, True], ids=["own heads", "all the same"])
def test_ranks_share_a_store(is_replicated: bool, tmp_path: Path) -> None:
    everyone = range(RANKS)
    ranks = Ranks(str(tmp_path / "s"), is_replicated=is_replicated)
    try:
        assert [ranks.take(rank) for rank in everyone] == ["ready"] * RANKS
        assert ranks.order("write states", *everyone) == [[True]] * RANKS
        assert ranks.order("ask", *everyone) == [()] * RANKS
        assert ranks.order("write pages", 0) == [[True] * PAGES]
        # What rank 0 wrote is the others' prefix, too, only if all hold the same.
        others = [(PAGES,)] * (RANKS - 1) if is_replicated else [()] * (RANKS - 1)
        assert ranks.order("ask", *everyone) == [(PAGES,), *others]
        if not is_replicated:
            ranks.order("write pages", 1)
        assert ranks.order("ask", *everyone) == [(PAGES,)] * RANKS
        assert ranks.order("read", *everyone) == [True] * RANKS
        # A rank that dies takes nothing with it.
        ranks.processes[1].kill()
        ranks.processes[1].join(DEADLINE_S)
        assert ranks.order("read", 0) == [True]
        assert ranks.order("close", 0) == ["closed"]
    finally:
        ranks.end()
