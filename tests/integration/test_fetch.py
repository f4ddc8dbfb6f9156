"""Asking another node what it has of a prompt, and pulling it: complete and bit-identical, or absent."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.errors import (
    PeerClosingError,
    PeerGoneError,
    PeerMismatchError,
    PoolFullError,
    SpecError,
    StoreClosedError,
    TransferError,
    TransferFullError,
    TransferTooLargeError,
)
from kvstore.keys import ExtraInput
from kvstore.spec import ChunkGrid, Shard
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, Fetcher, RemoteMatch, TransferSettings
from kvstore.transfer.asking import Asking
from tests.integration.transfer_nodes import (
    FAST,
    WITHIN_S,
    Recorder,
    address,
    assert_same,
    assert_settled,
    match_all,
    prompt,
    put_layer,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.handle import Handle
    from kvstore.transfer import FetchReport


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def there() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        yield store


@pytest.fixture
def here() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        yield store


@pytest.fixture
def endpoint(there: kvstore.Store, scheme: str) -> Iterator[Endpoint]:
    with Endpoint(there.pool, address(scheme), settings=FAST, serves=True) as endpoint:
        yield endpoint


@pytest.fixture
def tcp(there: kvstore.Store) -> Iterator[Endpoint]:
    with Endpoint(there.pool, address("tcp"), settings=FAST, serves=True) as endpoint:
        yield endpoint


@pytest.fixture
def fetcher(here: kvstore.Store) -> Iterator[Fetcher]:
    with Fetcher(here.pool, settings=FAST) as fetcher:
        yield fetcher


def fetch(fetcher: Fetcher, store: kvstore.Store, ids: list[int], node: Endpoint) -> Handle[FetchReport]:
    """Fetch a whole prompt: one more token is asked for than is stored."""
    return fetcher.fetch(store.prompt([*ids, 1]), node.address)


def serves_nobody(node: Endpoint) -> None:
    """No transfer holds a lease any more."""
    wait_until(lambda: node.served_count == 0, "every served transfer has ended")


@pytest.mark.parametrize("tokens", [3, 4, 5, 18, 40])
def test_a_resume_point_is_fetched_whole(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher, tokens: int
) -> None:
    ids = prompt(tokens)
    store_prompt(there, ids)
    report = fetch(fetcher, here, ids, endpoint).result(WITHIN_S)
    assert_same(there, here, ids, tokens)
    assert_settled(here, there)
    with there.read(match_all(there, ids)) as lease:
        sizes = sum(int(record.layout.piece_sizes.sum()) for record in lease.records)
    assert (report.tokens, report.local_tokens, report.received_bytes) == (tokens, tokens, sizes)
    assert (report.reconnects, report.is_shared, report.address) == (0, False, endpoint.address)
    assert report.transfer is not None
    assert 0 < report.transfer_s <= report.seconds
    serves_nobody(endpoint)
    counted = endpoint.serving_statistics()
    assert (counted.queries, counted.hits, counted.fetches, counted.served, counted.failed) == (1, 1, 1, 1, 0)
    assert counted.sent_bytes == sizes
    assert endpoint.statistics().committed == 0, "nothing was written there"


def test_a_tail_inside_the_prompt_is_found(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    """A turn that ended in the middle of a block is the resume point of the next turn."""
    store_prompt(there, prompt(18))
    longer = here.prompt(prompt(40))
    report = fetcher.fetch(longer, endpoint.address).result(WITHIN_S)
    assert (report.tokens, here.match(longer).tokens) == (18, 18)
    assert_same(there, here, prompt(18), 18)


def test_inputs_that_are_no_tokens_count(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    image, other = (ExtraInput(5, data) for data in (b"image", b"another"))
    with there.write(prompt(10), extras=[image], resume_at=(8, 10)) as writer:
        for layer in there.spec.layers:
            put_layer(writer, layer, 0, 10, (8, 10), 0, Shard())
        writer.commit()
    asked = prompt(20)
    assert here.query(asked, tcp.address, extras=[image]).tokens == 10
    assert not here.query(asked, tcp.address, extras=[other])
    assert not here.query(asked, tcp.address)
    assert fetcher.fetch(here.prompt(asked, extras=[image]), tcp.address).result(WITHIN_S).tokens == 10
    assert here.match(asked, extras=[image]).tokens == 10
    assert here.match(asked, extras=[other]).tokens == 0


def test_an_answer_says_what_is_there(here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint) -> None:
    store_prompt(there, prompt(24), resume_at=(8, 16, 24))
    found = here.query([*prompt(24), 1], endpoint.address)
    local = match_all(there, prompt(24))
    assert found
    assert [each.tokens for each in found.candidates] == [24, 16, 8]
    assert [each.size_bytes for each in found.candidates] == [each.size_bytes for each in local.candidates]
    assert local.best is not None
    assert (found.tokens, found.tier, found.size_bytes) == (24, local.tier, local.best.size_bytes)
    assert (found.address, found.pending_tokens, found.expected_s) == (endpoint.address, 0, None)
    assert (found.at(16).tokens, found.at(16).candidates) == (16, found.candidates[1:])
    with pytest.raises(ValueError, match="it named: 24, 16, 8"):
        found.at(12)
    assert here.match([*prompt(24), 1]).tokens == 0, "a question moves nothing"
    # At most one token less than the prompt has.
    assert here.query(prompt(24), endpoint.address).tokens == 16
    assert here.fetch(found).result(WITHIN_S).tokens == 24
    again = here.query([*prompt(24), 1], endpoint.address).expected_s
    assert again is not None
    assert again > 0


def test_a_miss_is_falsy_and_no_error(here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint) -> None:
    store_prompt(there, prompt(24), salt=b"one tenant")
    for salt in (b"", b"one", b"one tenan", b"another tenant"):
        found = here.query([*prompt(24), 1], endpoint.address, salt=salt)
        assert not found
        assert (found.tokens, found.tier, found.size_bytes, found.candidates) == (0, None, 0, ())
        report = here.fetch([*prompt(24), 1], endpoint.address, salt=salt).result(WITHIN_S)
        assert (report.tokens, report.local_tokens, report.received_bytes, report.transfer) == (0, 0, 0, None)
    assert here.query([*prompt(24), 1], endpoint.address, salt=b"one tenant", adapter="lora").tokens == 0
    assert here.query([*prompt(24), 1], endpoint.address, salt=b"one tenant").tokens == 24
    assert here.fetch([*prompt(24), 1], endpoint.address, salt=b"one tenant").result(WITHIN_S).tokens == 24
    assert_same(there, here, prompt(24), 24, salt=b"one tenant")


def test_what_is_being_written_is_pending(here: kvstore.Store, there: kvstore.Store, tcp: Endpoint) -> None:
    with there.write(prompt(16)) as writer:
        found = here.query([*prompt(16), 1], tcp.address)
        assert not found
        assert found.pending_tokens == 16
        writer.abort("it was only a test")


def test_only_what_is_missing_crosses(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(32), resume_at=(16, 32))
    store_prompt(here, prompt(16))
    recorder = Recorder()
    report = fetcher.fetch(here.prompt([*prompt(32), 1]), endpoint.address, observer=recorder).result(WITHIN_S)
    assert_same(there, here, prompt(32), 32)
    sizes = match_all(there, prompt(32)).candidates[0].bytes_by_group
    states = sizes["delta"] + sizes["window"]
    assert report.received_bytes == recorder.received_bytes == sizes["full"] // 2 + states
    assert_settled(here, there)


def test_nothing_is_asked_that_is_here(here: kvstore.Store) -> None:
    """Nobody listens at this address, and nobody needs to."""
    store_prompt(here, prompt(16))
    report = here.fetch([*prompt(16), 1], "tcp://127.0.0.1:1").result(WITHIN_S)
    assert (report.tokens, report.local_tokens, report.received_bytes) == (0, 16, 0)
    with pytest.raises(PeerGoneError):
        here.fetch([*prompt(20), 1], "tcp://127.0.0.1:1").result(WITHIN_S)


def test_nothing_is_fetched_that_is_not_deeper(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(16))
    store_prompt(here, prompt(24), resume_at=(16, 24))
    report = fetcher.fetch(here.prompt(prompt(40)), tcp.address).result(WITHIN_S)
    assert (report.tokens, report.local_tokens) == (0, 24)
    assert tcp.serving_statistics().fetches == 0


def test_a_shallower_candidate_can_be_chosen(here: kvstore.Store, there: kvstore.Store, tcp: Endpoint) -> None:
    store_prompt(there, prompt(24), resume_at=(8, 24))
    found = here.query([*prompt(24), 1], tcp.address)
    assert here.fetch(found.at(8)).result(WITHIN_S).tokens == 8
    assert match_all(here, prompt(24)).tokens == 8
    with pytest.raises(TransferError, match="says what was asked"):
        here.fetch(found, salt=b"x")


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_fetches_its_share(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher, index: int
) -> None:
    shard = Shard(index, 2)
    for each in (Shard(0, 2), Shard(1, 2)):
        store_prompt(there, prompt(18), shard=each)
    asked = here.prompt([*prompt(18), 1])
    report = fetcher.fetch(asked, endpoint.address, shard=shard).result(WITHIN_S)
    assert report.tokens == 18
    assert here.match(asked, shard=shard).tokens == 18
    assert here.match(asked).tokens == 0, "the other worker's share has not come"
    ours, theirs = there.match(asked, shard=shard), here.match(asked, shard=shard)
    with there.read(ours) as left, here.read(theirs, verify=True) as right:
        for layer in here.spec.layers:
            for name in left.layer(layer).names:
                assert left.layer(layer).read(name).tobytes() == right.layer(layer).read(name).tobytes()
    assert fetcher.fetch(asked, endpoint.address).result(WITHIN_S).tokens == 18
    assert_same(there, here, prompt(18), 18)


def test_a_share_that_no_model_has_is_refused(here: kvstore.Store, tcp: Endpoint, fetcher: Fetcher) -> None:
    asked = here.prompt(prompt(8))
    with pytest.raises((TransferError, SpecError), match="split"):
        fetcher.query(asked, tcp.address, shard=Shard(0, 3), deadline_s=5.0).result(WITHIN_S)
    with pytest.raises(TransferError, match="limit is 65535"):
        fetcher.query(asked, tcp.address, shard=Shard(0, 65536), deadline_s=5.0)


def test_a_grid_is_insisted_on(here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher) -> None:
    grid = ChunkGrid.every(8, upto=24)
    other = ChunkGrid.every(12, upto=24)
    store_prompt(there, prompt(24), resume_at=(8, 24), grid=grid)
    asked = here.prompt([*prompt(24), 1])
    assert here.query(asked, endpoint.address, grid=other).tokens == 0
    assert fetcher.fetch(asked, endpoint.address, grid=other).result(WITHIN_S).tokens == 0
    assert here.query(asked, endpoint.address, grid=grid).tokens == 24
    assert fetcher.fetch(asked, endpoint.address, grid=grid).result(WITHIN_S).tokens == 24
    assert here.match(asked, grid=grid).tokens == 24
    assert here.match(asked, grid=other).tokens == 0
    assert_same(there, here, prompt(24), 24, grid=grid)


def test_waits_come_as_values(here: kvstore.Store, there: kvstore.Store, tcp: Endpoint) -> None:
    store_prompt(there, prompt(16))

    async def both() -> tuple[RemoteMatch, FetchReport]:
        found = await here.ask([*prompt(16), 1], tcp.address)
        return found, await here.fetch(found)

    found, report = asyncio.run(both())
    assert (found.tokens, report.tokens) == (16, 16)
    assert_same(there, here, prompt(16), 16)


def test_many_fetches_of_one_prefix_share_one_transfer(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    """Twenty requests with one system prompt and twenty ends."""
    ids = prompt(32)
    store_prompt(there, ids)
    handles = [
        fetcher.fetch(here.prompt([*ids, *prompt(8, seed=number)]), endpoint.address, observer=Recorder(0.002))
        for number in range(1, 21)
    ]
    reports = [handle.result(WITHIN_S) for handle in handles]
    assert all(report.local_tokens == 32 for report in reports)
    assert [report.tokens for report in reports if report.transfer is not None] == [32]
    assert endpoint.serving_statistics().fetches == 1
    assert_same(there, here, ids, 32)
    assert_settled(here, there)
    serves_nobody(endpoint)


def test_a_longer_prefix_waits_for_a_shorter_one(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(40), resume_at=(32, 40))
    slow = Recorder(0.01)
    first = fetcher.fetch(here.prompt([*prompt(32), 1]), tcp.address, observer=slow)
    wait_until(lambda: bool(slow.received), "the first one is under way")
    second = fetcher.fetch(here.prompt([*prompt(40), 1]), tcp.address)
    assert first.result(WITHIN_S).tokens == 32
    report = second.result(WITHIN_S)
    assert (report.tokens, report.is_shared) == (40, False)
    sizes = match_all(there, prompt(40)).candidates[0].bytes_by_group
    assert report.received_bytes < sizes["full"], "the blocks of the first one did not cross again"
    assert_same(there, here, prompt(40), 40)


def test_another_tries_when_the_shared_fetch_was_cancelled(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(64))
    slow = Recorder(0.05)
    first = fetcher.fetch(here.prompt([*prompt(64), 1]), endpoint.address, observer=slow)
    wait_until(lambda: bool(slow.received), "the first one is under way")
    second = fetch(fetcher, here, prompt(64), endpoint)
    first.cancel("the user left")
    with pytest.raises(TransferError, match="the user left"):
        first.result(WITHIN_S)
    assert second.result(WITHIN_S).tokens == 64
    assert_same(there, here, prompt(64), 64)
    assert_settled(here, there)


def test_what_was_evicted_after_the_answer(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node says what it has instead, and the next best is fetched; in the end it is a miss."""
    store_prompt(there, prompt(24), resume_at=(8, 16, 24))
    path = there.prompt(prompt(24)).path
    asked = Asking.fetch
    evicted: list[int] = []

    def evict_first(self: Asking, *arguments: object) -> object:
        if len(evicted) < 2:
            node = 5 - 2 * len(evicted)
            evicted.append(there.pool.evict(path.key(node), states_only=True))
        return asked(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Asking, "fetch", evict_first)
    report = fetch(fetcher, here, prompt(24), endpoint).result(WITHIN_S)
    assert all(evicted)
    assert report.tokens == 8
    assert_same(there, here, prompt(8), 8)

    def evict_all(self: Asking, *arguments: object) -> object:
        there.pool.evict(there.prompt(prompt(12, seed=5)).path.key(0))
        return asked(self, *arguments)  # type: ignore[arg-type]

    store_prompt(there, prompt(12, seed=5), seed=5)
    monkeypatch.setattr(Asking, "fetch", evict_all)
    report = fetch(fetcher, here, prompt(12, seed=5), endpoint).result(WITHIN_S)
    assert (report.tokens, report.received_bytes) == (0, 0)
    assert_settled(here, there)
    serves_nobody(endpoint)


def test_a_lease_is_held_only_while_it_is_served(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(32))
    first = there.prompt(prompt(32)).path.key(0)
    slow = Recorder(0.05)
    handle = fetcher.fetch(here.prompt([*prompt(32), 1]), endpoint.address, observer=slow)
    wait_until(lambda: bool(slow.received), "it is under way")
    assert there.pool.evict(first) == 0
    assert handle.result(WITHIN_S).tokens == 32
    serves_nobody(endpoint)
    assert there.pool.evict(first) > 0


def test_no_room_here(there: kvstore.Store, scheme: str) -> None:
    with (
        kvstore.open(tiny_spec(), dram="256KiB") as small,
        Endpoint(there.pool, address(scheme), settings=FAST, serves=True) as node,
        Fetcher(small.pool, settings=FAST) as fetcher,
    ):
        store_prompt(there, prompt(16, seed=1), seed=1)
        store_prompt(there, prompt(400, seed=2), seed=2)
        with pytest.raises(TransferTooLargeError, match="this store has no room"):
            fetch(fetcher, small, prompt(400, seed=2), node).result(WITHIN_S)
        with ExitStack() as writers:
            with suppress(PoolFullError):
                for seed in range(100):
                    writers.enter_context(small.write(prompt(8, seed=50 + seed)))
            with pytest.raises(TransferFullError, match="this store has no room"):
                fetch(fetcher, small, prompt(16, seed=1), node).result(WITHIN_S)
        assert fetch(fetcher, small, prompt(16, seed=1), node).result(WITHIN_S).tokens == 16
        assert_settled(small, there)


def test_two_full_nodes_that_fetch_from_each_other_both_end(scheme: str) -> None:
    with (
        kvstore.open(tiny_spec(), dram="512KiB") as left,
        kvstore.open(tiny_spec(), dram="512KiB") as right,
        Endpoint(left.pool, address(scheme), settings=FAST, serves=True) as at_left,
        Endpoint(right.pool, address(scheme), settings=FAST, serves=True) as at_right,
        Fetcher(left.pool, settings=FAST) as to_left,
        Fetcher(right.pool, settings=FAST) as to_right,
    ):
        for seed in range(1, 9):
            store_prompt(left, prompt(24, seed=seed), seed=seed)
            store_prompt(right, prompt(24, seed=seed + 100), seed=seed + 100)
        handles = [fetch(to_left, left, prompt(24, seed=seed + 100), at_right) for seed in range(1, 9)]
        handles += [fetch(to_right, right, prompt(24, seed=seed), at_left) for seed in range(1, 9)]
        outcomes: list[str] = []
        for handle in handles:
            try:
                handle.result(WITHIN_S)
                outcomes.append("done")
            except TransferFullError:
                outcomes.append("full")
        assert len(outcomes) == 16
        assert_settled(left, right)
        serves_nobody(at_left)
        serves_nobody(at_right)


def test_a_slow_fetch_slows_no_other(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(64))
    store_prompt(there, prompt(16, seed=3), seed=3)
    gate = threading.Event()

    class Waiting(Recorder):
        def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
            super().piece_received(layer, size_bytes, start_s, end_s)
            assert gate.wait(WITHIN_S)

    slow = Waiting()
    first = fetcher.fetch(here.prompt([*prompt(64), 1]), endpoint.address, observer=slow)
    wait_until(lambda: bool(slow.received), "it is under way")
    assert fetch(fetcher, here, prompt(16, seed=3), endpoint).result(WITHIN_S).tokens == 16
    assert not first.done()
    gate.set()
    assert first.result(WITHIN_S).tokens == 64


# Who may ask


def test_a_node_answers_only_if_it_was_told_to(here: kvstore.Store, there: kvstore.Store, scheme: str) -> None:
    store_prompt(there, prompt(16))
    node = there.listen(address(scheme))
    with pytest.raises(TransferError, match="serves=True"):
        here.query([*prompt(16), 1], node.address)
    with pytest.raises(TransferError, match="serves=True"):
        here.fetch([*prompt(16), 1], node.address).result(WITHIN_S)
    assert node.served_count == 0
    assert node.serving_statistics().queries == 0
    # Sending is another right.
    store_prompt(here, prompt(12, seed=4), seed=4)
    here.send(match_all(here, prompt(12, seed=4)), node.address).result(WITHIN_S)
    assert match_all(there, prompt(12, seed=4)).tokens == 12


def test_an_older_release_is_named(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from kvstore.transfer import session
    from kvstore.transfer.messages import Feature, Hello

    current = session.make_hello

    def older(*arguments: object, **options: object) -> Hello:
        hello = current(*arguments, **options)  # type: ignore[arg-type]
        return replace(hello, features=hello.features & ~Feature.MATCH)

    monkeypatch.setattr(session, "make_hello", older)
    with pytest.raises(TransferError, match="does not know remote match"):
        here.query(prompt(8), tcp.address)
    with pytest.raises(TransferError, match="does not know remote match"):
        here.fetch(prompt(8), tcp.address).result(WITHIN_S)
    # What such a node does know goes on.
    store_prompt(here, prompt(12))
    here.send(match_all(here, prompt(12)), tcp.address).result(WITHIN_S)


def test_another_model_is_named(there: kvstore.Store, tcp: Endpoint) -> None:
    with kvstore.open(tiny_spec(weights="others"), dram="8MiB") as stranger:
        with pytest.raises(PeerMismatchError, match="fingerprint"):
            stranger.query(prompt(8), tcp.address)
        with pytest.raises(PeerMismatchError, match="fingerprint"):
            stranger.fetch(prompt(8), tcp.address).result(WITHIN_S)


def test_limits_count_both_roles(here: kvstore.Store, there: kvstore.Store, scheme: str) -> None:
    settings = TransferSettings(progress_deadline_s=2.0, transfers_per_peer_max=1)
    store_prompt(there, prompt(64))
    store_prompt(there, prompt(16, seed=1), seed=1)
    gate = threading.Event()

    class Waiting(Recorder):
        def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
            super().piece_received(layer, size_bytes, start_s, end_s)
            assert gate.wait(WITHIN_S)

    with (
        Endpoint(there.pool, address(scheme), settings=settings, serves=True) as node,
        Fetcher(here.pool, settings=FAST) as fetcher,
    ):
        slow = Waiting()
        first = fetcher.fetch(here.prompt([*prompt(64), 1]), node.address, observer=slow)
        wait_until(lambda: bool(slow.received), "it is under way")
        with pytest.raises(TransferError, match="1 transfers of this peer"):
            fetch(fetcher, here, prompt(16, seed=1), node).result(WITHIN_S)
        # Nothing is held for who was refused.
        assert there.pool.evict(there.prompt(prompt(16, seed=1)).path.key(0)) > 0
        store_prompt(there, prompt(16, seed=1), seed=1)
        gate.set()
        assert first.result(WITHIN_S).tokens == 64
        serves_nobody(node)
        assert fetch(fetcher, here, prompt(16, seed=1), node).result(WITHIN_S).tokens == 16


def test_a_node_that_drains_begins_nothing_and_ends_what_runs(
    here: kvstore.Store, there: kvstore.Store, endpoint: Endpoint, fetcher: Fetcher
) -> None:
    store_prompt(there, prompt(64))
    store_prompt(there, prompt(16, seed=1), seed=1)
    gate = threading.Event()

    class Waiting(Recorder):
        def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
            super().piece_received(layer, size_bytes, start_s, end_s)
            assert gate.wait(WITHIN_S)

    slow = Waiting()
    first = fetcher.fetch(here.prompt([*prompt(64), 1]), endpoint.address, observer=slow)
    wait_until(lambda: bool(slow.received), "it is under way")
    assert not endpoint.drain(0.01)
    with pytest.raises(PeerClosingError, match="elsewhere"):
        fetch(fetcher, here, prompt(16, seed=1), endpoint).result(WITHIN_S)
    gate.set()
    assert endpoint.drain(WITHIN_S)
    assert first.result(WITHIN_S).tokens == 64
    assert endpoint.served_count == 0


def test_the_number_of_open_fetches_is_limited(here: kvstore.Store, there: kvstore.Store, tcp: Endpoint) -> None:
    settings = TransferSettings(transfers_per_node_max=1)
    store_prompt(there, prompt(64))
    slow = Recorder(0.05)
    with Fetcher(here.pool, settings=settings) as fetcher:
        first = fetcher.fetch(here.prompt([*prompt(64), 1]), tcp.address, observer=slow)
        with pytest.raises(TransferError, match="1 questions and fetches"):
            fetch(fetcher, here, prompt(16), tcp)
        assert first.result(WITHIN_S).tokens == 64
        wait_until(lambda: fetcher.running_count == 0, "it has ended")


def test_misuse_is_named(here: kvstore.Store, there: kvstore.Store, tcp: Endpoint) -> None:
    with pytest.raises(TransferError, match="address= is needed"):
        here.fetch(prompt(8))
    with pytest.raises(TransferError, match="priority=256"):
        here.fetch(prompt(8), tcp.address, priority=256)
    with pytest.raises(TransferError, match="total_deadline_s=-1"):
        here.fetch(prompt(8), tcp.address, total_deadline_s=-1)
    with pytest.raises(TransferError, match=r"^deadline_s=0"):
        here.query(prompt(8), tcp.address, deadline_s=0)
    with pytest.raises(SpecError, match="shard="):
        here.fetch(prompt(8), tcp.address, shard=2)  # type: ignore[arg-type]
    here.close()
    with pytest.raises(StoreClosedError):
        here.fetch(prompt(8), tcp.address)
    with pytest.raises(StoreClosedError):
        here.query(prompt(8), tcp.address)


def test_one_token_has_nothing_to_resume(here: kvstore.Store, tcp: Endpoint) -> None:
    assert not here.query([7], tcp.address)
    assert here.fetch([7], tcp.address).result(WITHIN_S).tokens == 0
