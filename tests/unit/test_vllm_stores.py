"""How a worker of the vLLM connector finds its store, loses it and finds it again."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from kvstore.adapters.vllm import stores
from kvstore.adapters.vllm.stores import StoreAccess
from kvstore.errors import AttachError, OwnerGoneError, PoolFullError
from kvstore.limits import ATTACH_DEADLINE_S
from kvstore.store import attach_store, open_store
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.specs import dense

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvstore.spec import ModelSpec
    from kvstore.store import Store

TEST_S = 30.0
SPEC = dense(4)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Attaching:
    """Attaches for real, counted; `is_held` lets nobody through."""

    def __init__(self) -> None:
        self.count = 0
        self.may_go = threading.Event()
        self.may_go.set()
        self.ended = threading.Semaphore(0)

    def __call__(self, path: str, spec: ModelSpec, deadline_s: float) -> Store:
        self.count += 1
        try:
            assert self.may_go.wait(TEST_S)
            return attach_store(path, spec=spec, deadline_s=deadline_s)
        finally:
            self.ended.release()


class Setting:
    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.clock = Clock()
        self.attaching = Attaching()
        self.access = StoreAccess(SPEC, again_s=5.0, deadline_s=TEST_S, attach=self.attaching, clock=self.clock)

    def settle(self) -> None:
        """Wait for the attempt that has begun."""
        thread = self.access._attaching
        if thread is not None:
            thread.join(TEST_S)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with leaves_nothing():
        setting = Setting(str(tmp_path / "store"))
        yield setting
        setting.access.close()


def test_the_owners_process_uses_the_owners_store(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket) as store:
        stores.share(setting.socket, store)
        assert setting.access.get(setting.socket) is store
        setting.access.close()
        assert not store.is_closed
        stores.withdraw(setting.socket, store)
    assert not setting.attaching.count


def test_sharing_ends_for_the_store_that_was_shared(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB") as old, open_store(SPEC, dram="1MiB") as new:
        stores.share(setting.socket, old)
        stores.share(setting.socket, new)
        stores.withdraw(setting.socket, old)
        assert stores.shared(setting.socket) is new
        stores.withdraw(setting.socket, new)
        assert stores.shared(setting.socket) is None


def test_another_models_store_is_not_taken(setting: Setting) -> None:
    with open_store(dense(8), dram="1MiB", socket=setting.socket) as other:
        stores.share(setting.socket, other)
        assert setting.access.get(setting.socket) is None
        assert "SpecError" in setting.access.why_not
        stores.withdraw(setting.socket, other)


def test_nothing_is_looked_for_without_a_path(setting: Setting) -> None:
    assert setting.access.get("") is None
    assert not setting.access.is_gone
    assert not setting.attaching.count


def test_a_worker_attaches_when_it_is_told_the_path(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket) as owner:
        store = setting.access.get(setting.socket)
        assert store is not None
        assert store is not owner
        assert setting.access.get(setting.socket) is store
        assert setting.attaching.count == 1
        setting.access.close()
        assert store.is_closed
        assert setting.access.get(setting.socket) is None


def test_an_owner_that_comes_back_is_found_again(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        first = setting.access.get(setting.socket)
        assert first is not None
    with pytest.raises(OwnerGoneError):
        first.match(range(8))
    setting.access.failed(first, OwnerGoneError("the owner has gone"))
    assert setting.access.is_gone
    assert setting.access.get(setting.socket) is None
    assert setting.attaching.count == 1, "too soon"
    setting.clock.now_s += 6.0
    assert setting.access.get(setting.socket) is None
    setting.settle()
    assert setting.attaching.count == 2
    assert "AttachError" in setting.access.why_not
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        assert setting.access.get(setting.socket) is None, "too soon"
        setting.clock.now_s += 6.0
        assert setting.access.get(setting.socket) is None, "this call does not wait"
        setting.settle()
        second = setting.access.get(setting.socket)
        assert second is not None
        assert not second.is_closed
        assert not setting.access.is_gone
        assert setting.attaching.count == 3
        setting.access.close()


def test_a_store_that_was_closed_is_noticed_without_a_failure(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        store = setting.access.get(setting.socket)
        assert store is not None
        store.close()
        assert setting.access.get(setting.socket) is None
        assert setting.access.is_gone


def test_failures_that_say_nothing_of_the_store_do_not_drop_it(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        store = setting.access.get(setting.socket)
        assert store is not None
        setting.access.failed(store, PoolFullError("full"))
        assert setting.access.get(setting.socket) is store
        setting.access.close()


def test_a_failure_of_a_store_that_was_replaced_is_ignored(setting: Setting) -> None:
    with ExitStack() as last:
        last.enter_context(open_store(SPEC, dram="1MiB", socket=setting.socket))
        store = setting.access.get(setting.socket)
        assert store is not None
        other = last.enter_context(open_store(SPEC, dram="1MiB"))
        setting.access.failed(other, OwnerGoneError("gone"))
        assert setting.access.get(setting.socket) is store
        setting.access.close()


def test_closing_while_it_attaches_leaves_nothing_attached(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket) as owner:
        store = setting.access.get(setting.socket)
        assert store is not None
        setting.access.failed(store, OwnerGoneError("gone"))
        setting.clock.now_s += 6.0
        setting.attaching.may_go.clear()
        assert setting.access.get(setting.socket) is None
        closing = threading.Thread(target=setting.access.close)
        closing.start()
        setting.attaching.may_go.set()
        closing.join(TEST_S)
        assert not closing.is_alive()
        assert setting.attaching.count == 2
        owner.close()


def test_an_owner_that_listens_nowhere(setting: Setting) -> None:
    assert setting.access.get(setting.socket) is None
    assert setting.access.is_gone
    assert AttachError.__name__ in setting.access.why_not


def test_an_attach_begun_early_is_there_when_it_is_asked_for(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        setting.access.begin(setting.socket)
        setting.settle()
        assert setting.attaching.count == 1
        assert setting.access.get(setting.socket) is not None
        setting.access.begin(setting.socket)
        assert setting.attaching.count == 1
        setting.access.close()


def test_an_early_attach_that_runs_is_waited_for_like_a_first_one(setting: Setting) -> None:
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        setting.attaching.may_go.clear()
        setting.access.begin(setting.socket)
        found: list[Store | None] = []
        asking = threading.Thread(target=lambda: found.append(setting.access.get(setting.socket)))
        asking.start()
        setting.attaching.may_go.set()
        asking.join(TEST_S)
        assert found
        assert found[0] is not None
        assert setting.attaching.count == 1
        setting.access.close()


def test_an_early_attach_that_failed_is_forgotten(setting: Setting) -> None:
    setting.access.begin(setting.socket)
    setting.settle()
    assert not setting.access.is_gone, "nobody has wanted it"
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        assert setting.access.get(setting.socket) is not None, "the first question tries again, at once"
        assert setting.attaching.count == 2
        setting.access.close()


def test_an_owner_that_does_not_answer_keeps_a_step_no_longer_than_the_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "stopped")
    with leaves_nothing(), closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.bind(path)
        silent.listen(4)  # the system takes connections for a process that is stopped
        access = StoreAccess(SPEC, again_s=60.0, deadline_s=0.1)
        begin_s = time.monotonic()
        assert access.get(path) is None
        assert time.monotonic() - begin_s < ATTACH_DEADLINE_S, "its own deadline holds, not that of attach"
        assert access.get(path) is None
        access.close()


def test_why_nothing_is_cached_is_logged_once(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvstore.adapters.vllm")
    for _ in range(3):
        setting.access.get(setting.socket)
        setting.settle()
        setting.clock.now_s += 6.0
    assert setting.attaching.count == 3
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "no owner can be reached" in caplog.text
    caplog.clear()
    with open_store(dense(8), dram="1MiB", socket=setting.socket):
        setting.access.get(setting.socket)
        setting.settle()
    assert setting.access.refused is not None
    assert "fingerprint" in caplog.text
    setting.clock.now_s += 6.0
    caplog.clear()
    with open_store(SPEC, dram="1MiB", socket=setting.socket):
        setting.access.get(setting.socket)
        setting.settle()
        assert "again" in caplog.text
        assert setting.access.refused is None
        setting.access.close()
