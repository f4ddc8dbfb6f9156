"""A transfer that failed because its peer could not be reached is taken up again by its id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import kvstore
import kvstore.transfer.attachment
from kvstore.errors import PeerGoneError, TransferAbortedError, TransferError
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from tests.integration.tcp_proxy import CutAfter, Proxy
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    WITHIN_S,
    Recorder,
    assert_same,
    assert_settled,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = prompt(BIG_TOKENS)
LOOPBACK = "tcp://127.0.0.1:0"
BRIEF = TransferSettings(progress_deadline_s=0.5, connect_deadline_s=5.0, connections=1)
PATIENT = TransferSettings(resume_window_s=60.0)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.transfer.attachment, "FRAME_BYTES", 16 << 10)


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="32MiB") as store:
        store_prompt(store, IDS)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="32MiB") as store:
        yield store


def send(store: kvstore.Store, to: str, sender: Sender, **options: Any) -> Any:
    return send_lease(store.read(match_all(store, IDS)), to, sender=sender, **options).result(WITHIN_S)


def fail(store: kvstore.Store, endpoint: Endpoint, sender: Sender, after_bytes: int) -> tuple[int, int]:
    """Have a transfer fail once so many bytes have crossed; its id."""
    cut = CutAfter(after_bytes)
    with (
        Proxy(endpoint.address, lambda number: CutAfter(0) if number else cut) as proxy,
        pytest.raises(PeerGoneError) as caught,
    ):
        send(store, proxy.address, sender)
    assert caught.value.transfer is not None
    return caught.value.transfer


@pytest.mark.parametrize("after_bytes", [30_000, 700_000, 2_000_000])
def test_only_what_is_left_crosses(source: kvstore.Store, target: kvstore.Store, after_bytes: int) -> None:
    seen = Recorder()
    with Endpoint(target.pool, LOOPBACK, settings=PATIENT, observer=seen) as endpoint, Sender(settings=BRIEF) as sender:
        failed = fail(source, endpoint, sender, after_bytes)
        wait_until(lambda: endpoint.connection_count == 0, "the receiver had noticed")
        assert endpoint.transfer_count == 1
        arrived_bytes = seen.received_bytes
        report = send(source, endpoint.address, sender, resume=failed)
        total = sum(int(record.layout.piece_sizes.sum()) for record in source.read(match_all(source, IDS)).records)
        assert report.transfer == failed
        assert report.total_bytes == total - arrived_bytes
        assert arrived_bytes >= after_bytes - (64 << 10)
        assert endpoint.statistics().resumed >= 1
        assert_same(source, target, IDS, BIG_TOKENS)
        assert_settled(source, target)
        # Once committed it is known to be, for a while.
        assert send(source, endpoint.address, sender, resume=failed).total_bytes == 0


def test_what_the_receiver_has_given_up_is_refused(source: kvstore.Store, target: kvstore.Store) -> None:
    brief = TransferSettings(resume_window_s=0.1)
    with Endpoint(target.pool, LOOPBACK, settings=brief) as endpoint, Sender(settings=BRIEF) as sender:
        failed = fail(source, endpoint, sender, 700_000)
        # There is none before the receiver has seen the offer, either.
        wait_until(lambda: endpoint.statistics().aborted == 1, "the window had passed")
        assert endpoint.transfer_count == 0
        with pytest.raises(TransferAbortedError, match="none replaced it"):
            send(source, endpoint.address, sender, resume=failed)
        assert_settled(source, target)
        send(source, endpoint.address, sender)
        assert_same(source, target, IDS, BIG_TOKENS)


def test_another_offer_does_not_take_it_over(source: kvstore.Store, target: kvstore.Store) -> None:
    with Endpoint(target.pool, LOOPBACK, settings=PATIENT) as endpoint, Sender(settings=BRIEF) as sender:
        failed = fail(source, endpoint, sender, 700_000)
        with pytest.raises(TransferError, match="another offer"):
            send(source, endpoint.address, sender, resume=failed, priority=1)
        send(source, endpoint.address, sender, resume=failed)
        assert_same(source, target, IDS, BIG_TOKENS)


def test_ids_that_cannot_be_resumed(source: kvstore.Store, target: kvstore.Store) -> None:
    slow = Recorder(pause_s=0.05)
    with Endpoint(target.pool, LOOPBACK, observer=slow) as endpoint, Sender(settings=BRIEF) as sender:
        handle = send_lease(source.read(match_all(source, IDS)), endpoint.address, sender=sender)
        running = (sender.boot_epoch, 1)
        for resume, reason in (
            (running, "still running"),
            ((sender.boot_epoch, 2), "send it anew"),
            ((sender.boot_epoch ^ 1, 1), "send it anew"),
            ("1", "no transfer id"),
            ((1, 2, 3), "no transfer id"),
        ):
            with pytest.raises(TransferError, match=reason):
                send(source, endpoint.address, sender, resume=resume)
        handle.cancel()
        with pytest.raises(TransferAbortedError):
            handle.result(WITHIN_S)
    assert_settled(source, target)
