"""Waits as values: `kvstore.handle.Handle`."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import select
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import DeadlineError, TransferAbortedError
from kvstore.handle import Handle
from kvstore.testing.resources import Background, leaves_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

TEST_S = 20.0


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


def is_readable(descriptor: int, timeout_s: float = 0.0) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def test_result_is_there_after_resolve() -> None:
    handle: Handle[int] = Handle("the sum")
    assert not handle.done()
    handle.resolve(7)
    assert handle.done()
    assert handle.result(0.0) == 7
    assert handle.result(TEST_S) == 7


def test_none_is_a_result() -> None:
    handle: Handle[None] = Handle("nothing")
    handle.resolve(None)
    assert handle.done()
    assert handle.result(0.0) is None


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, 0.02])
def test_result_stops_at_its_deadline_and_the_work_goes_on(deadline_s: float) -> None:
    handle: Handle[int] = Handle("transfer 12")
    with pytest.raises(DeadlineError, match="transfer 12"):
        handle.result(deadline_s)
    assert not handle.done()
    handle.resolve(1)
    assert handle.result(0.0) == 1


def test_result_wakes_when_another_thread_resolves() -> None:
    handle: Handle[str] = Handle("a word")
    waiting = [Background(lambda: handle.result(math.inf)) for _ in range(3)]
    handle.resolve("done")
    assert [call.result(TEST_S) for call in waiting] == ["done"] * 3


def test_fail_raises_the_error_each_time() -> None:
    handle: Handle[int] = Handle("a transfer")
    error = TransferAbortedError("the peer gave it up")
    handle.fail(error)
    assert handle.done()
    for _ in range(2):
        with pytest.raises(TransferAbortedError) as caught:
            handle.result(0.0)
        assert caught.value is error


def test_the_first_end_wins() -> None:
    resolved: Handle[int] = Handle("a")
    resolved.resolve(1)
    resolved.fail(ValueError("late"))
    resolved.resolve(2)
    assert resolved.result(0.0) == 1
    failed: Handle[int] = Handle("b")
    failed.fail(ValueError("first"))
    failed.resolve(1)
    with pytest.raises(ValueError, match="first"):
        failed.result(0.0)


def test_one_of_many_racing_ends_wins_for_everybody() -> None:
    for _ in range(50):
        handle: Handle[int] = Handle("a race")
        descriptor = handle.fileno()
        racing = [Background(partial(handle.resolve, number)) for number in range(4)]
        seen = {handle.result(TEST_S)}
        for call in racing:
            call.result(TEST_S)
        seen.add(handle.result(0.0))
        assert len(seen) == 1
        assert os.eventfd_read(descriptor) == 1, "the descriptor was signalled more than once"


def test_cancel_asks_the_work_to_stop() -> None:
    handle: Handle[int] = Handle("a transfer", cancel=lambda reason: handle.fail(TransferAbortedError(reason)))
    handle.cancel("the user left")
    with pytest.raises(TransferAbortedError, match="the user left"):
        handle.result(0.0)


def test_cancel_after_the_end_and_without_a_way_does_nothing() -> None:
    reasons: list[str] = []
    ended: Handle[int] = Handle("a transfer", cancel=reasons.append)
    ended.resolve(3)
    ended.cancel()
    assert reasons == []
    assert ended.result(0.0) == 3
    endless: Handle[int] = Handle("work that cannot stop")
    endless.cancel()
    assert not endless.done()


def test_descriptor_becomes_readable_with_the_end() -> None:
    for error in (None, ValueError("x")):
        handle: Handle[int] = Handle("a transfer")
        descriptor = handle.fileno()
        assert not is_readable(descriptor)
        if error is None:
            handle.resolve(1)
        else:
            handle.fail(error)
        assert is_readable(descriptor)
        assert is_readable(descriptor), "it stays readable"
        assert handle.fileno() == descriptor


def test_descriptor_asked_for_after_the_end_is_readable() -> None:
    handle: Handle[int] = Handle("a transfer")
    handle.resolve(1)
    assert is_readable(handle.fileno())


def test_descriptor_wakes_select_in_another_thread() -> None:
    handle: Handle[int] = Handle("a transfer")
    waiting = Background(lambda: is_readable(handle.fileno(), TEST_S))
    time.sleep(0.02)
    handle.resolve(1)
    assert waiting.result(TEST_S)


def test_descriptor_is_not_inherited() -> None:
    handle: Handle[int] = Handle("a transfer")
    assert not os.get_inheritable(handle.fileno())


def test_await_before_and_after_the_end() -> None:
    async def main() -> None:
        handle: Handle[int] = Handle("a transfer")
        asyncio.get_running_loop().call_later(0.02, handle.resolve, 5)
        assert await handle == 5
        assert await handle == 5

    asyncio.run(main())


def test_await_raises_the_error() -> None:
    async def main() -> None:
        handle: Handle[int] = Handle("a transfer")
        asyncio.get_running_loop().call_later(0.02, handle.fail, TransferAbortedError("gone"))
        for _ in range(2):
            with pytest.raises(TransferAbortedError, match="gone"):
                await handle

    asyncio.run(main())


def test_await_does_not_block_the_loop_and_is_woken_by_a_thread() -> None:
    async def main() -> None:
        handle: Handle[str] = Handle("a transfer")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while not handle.done():
                ticks += 1
                if ticks == 5:
                    Background(lambda: handle.resolve("from a thread"))
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        assert await asyncio.wait_for(_value(handle), TEST_S) == "from a thread"
        await ticking
        assert ticks >= 5

    asyncio.run(main())


def test_two_tasks_await_one_handle_and_one_of_them_gives_up() -> None:
    async def main() -> None:
        handle: Handle[int] = Handle("a transfer")
        staying = [asyncio.create_task(_value(handle)) for _ in range(2)]
        leaving = asyncio.create_task(_value(handle))
        await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not handle.done(), "giving up a wait does not end the work"
        handle.resolve(9)
        assert await asyncio.gather(*staying) == [9, 9]

    asyncio.run(main())


def test_two_loops_await_one_handle() -> None:
    handle: Handle[int] = Handle("a transfer")
    waiting = [Background(lambda: asyncio.run(_value(handle))) for _ in range(2)]
    time.sleep(0.05)
    handle.resolve(4)
    assert [call.result(TEST_S) for call in waiting] == [4, 4]


def test_descriptor_goes_with_the_handle_also_after_an_error() -> None:
    gc.collect()
    gc.disable()
    try:
        with leaves_nothing():
            before = _open_eventfds()  # of other tests in this process, whose objects still live
            for _ in range(20):
                _fail_and_catch()
            assert _open_eventfds() <= before, "a failed handle is kept alive by its own error's traceback"
    finally:
        gc.enable()


def _fail_and_catch() -> None:
    handle: Handle[int] = Handle("a transfer")
    handle.fileno()
    handle.fail(ValueError("x"))
    result = handle.result
    del handle
    try:
        result(0.0)
    except ValueError:
        del result


def _open_eventfds() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sum("eventfd" in link for link in links)


async def _value(handle: Handle[int] | Handle[str]) -> int | str:
    return await handle
