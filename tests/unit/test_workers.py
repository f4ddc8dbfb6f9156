"""Threads that are used again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import kvstore.transfer.workers
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterator

WITHIN_S = 30.0


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


def test_a_thread_serves_one_task_after_another(workers: Workers) -> None:
    seen: list[tuple[int, str]] = []

    def work() -> None:
        seen.append((threading.get_ident(), threading.current_thread().name))

    for number in range(20):
        assert workers.run(work, f"task {number}").wait(WITHIN_S)
    assert [name for _, name in seen] == [f"task {number}" for number in range(20)]
    # A task has ended a moment before its thread can be had again.
    assert len({ident for ident, _ in seen}) < 20


def test_tasks_never_wait_for_each_other(workers: Workers) -> None:
    meet = threading.Barrier(9)
    tasks = [workers.run(lambda: meet.wait(WITHIN_S) and None, f"{number}") for number in range(8)]
    meet.wait(WITHIN_S)
    assert all(task.wait(WITHIN_S) for task in tasks)


def test_a_task_that_fails_takes_nothing_with_it(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("lost")

    assert workers.run(fail, "fails").wait(WITHIN_S)
    assert "fails ended by an error" in caplog.text
    assert workers.run(lambda: None, "goes on").wait(WITHIN_S)


def test_a_task_does_not_wait_for_itself(workers: Workers) -> None:
    answers: list[bool] = []
    begun = threading.Event()
    task = workers.run(lambda: (begun.wait(WITHIN_S), answers.append(task.wait(WITHIN_S)))[1], "itself")
    begun.set()
    assert task.wait(WITHIN_S)
    assert answers == [False]


def test_idle_threads_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.transfer.workers, "IDLE_S", 0.01)
    assert Workers().run(lambda: None, "once").wait(WITHIN_S)


def test_threads_that_time_out_while_they_are_needed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.transfer.workers, "IDLE_S", 0.0)
    workers = Workers()
    for number in range(500):
        assert workers.run(lambda: None, f"{number}").wait(WITHIN_S)
    workers.close()


def test_tasks_after_close_have_threads_of_their_own(workers: Workers) -> None:
    workers.close()
    assert workers.run(lambda: None, "late").wait(WITHIN_S)


def test_without_a_thread_nothing_has_begun(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        workers.run(lambda: pytest.fail("it ran"), "never")
