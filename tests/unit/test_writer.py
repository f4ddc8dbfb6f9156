"""Writers: what they take, what they refuse, and what is seen of them."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.errors import LeaseError, SpecError, TokenError, WriteError
from kvstore.keys import ExtraInput
from kvstore.limits import CHECKPOINTS_PER_WRITE_MAX, HANDOVER_PAYLOAD_BYTES_MAX
from kvstore.pool import HandOver
from kvstore.pool.room import Room
from kvstore.spec import ChunkGrid, Shard
from kvstore.store import Store, Writer, open_store
from kvstore.testing.specs import (
    check_lease,
    dense,
    hybrid,
    put_all,
    put_states,
    put_tokens,
    state_values,
    token_values,
)

if TYPE_CHECKING:
    from kvstore.abc import SlotRows

B = 16
IDS = [(11 * number) % 1000 for number in range(40)]


@pytest.fixture
def store():  # type: ignore[no-untyped-def]
    with open_store(hybrid(B), dram="4MiB") as store:
        yield store
        store.pool.check()


def values(writer: Writer, start: int, stop: int, layer: int = 1) -> dict[str, Any]:
    return {name: token_values(writer.spec, writer.prompt, layer, name, start, stop) for name in ("keys", "values")}


def states(writer: Writer, at: int, layer: int = 0) -> dict[str, Any]:
    return {name: state_values(writer.spec, writer.prompt, layer, name, at) for name in ("conv", "recurrent")}


def finish(writer: Writer, store: Store) -> None:
    """What a refused put must leave possible."""
    put_all(writer)
    writer.commit()
    with store.read(store.match([*IDS, 1]), verify=True) as lease:
        check_lease(lease, writer.prompt)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (slice(0, 41), "0 to 41 .* 40"),
        (slice(-1, 5), "-1 to 5"),
        (slice(5, 5), "5 to 5"),
        (slice(9, 5), "9 to 5"),
        (slice(0, 10, 2), "has a step"),
        (slice(40, None), "40 to 40"),
        (slice(0.5, 10), "no range of tokens"),
        (slice("a", 10), "no range of tokens"),
    ],
)
def test_ranges_that_are_none(store: Store, tokens: slice, message: str) -> None:
    with store.write(IDS) as writer:
        with pytest.raises(WriteError, match=message):
            writer.put(1, tokens=tokens, **values(writer, 0, 10))
        finish(writer, store)


def test_a_range_is_put_once(store: Store) -> None:
    with store.write(IDS) as writer:
        writer.put(1, tokens=slice(8, 20), **values(writer, 8, 20))
        for start, stop in ((8, 20), (0, 9), (19, 21), (0, 40), (10, 12)):
            with pytest.raises(WriteError, match="8 to 20"):
                writer.put(1, tokens=slice(start, stop), **values(writer, start, stop))
        writer.put(1, tokens=slice(0, 8), **values(writer, 0, 8))
        writer.put(1, tokens=slice(20, 40), **values(writer, 20, 40))
        put_tokens(writer, 0, 40, layer=3)
        put_states(writer, 40)
        writer.commit()
    with store.read(store.match([*IDS, 1]), verify=True) as lease:
        check_lease(lease, writer.prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array[:1], r"shape \[1, 10, 4\], expected \[2, 10, 4\]"),
        (lambda array: array[:, :9], r"\[2, 9, 4\]"),
        (lambda array: array[..., :3], r"\[2, 10, 3\]"),
        (lambda array: array[None], r"\[1, 2, 10, 4\]"),
        (lambda array: array.astype(np.float64), "float64"),
        (lambda array: array.view(np.uint32), "uint32"),
        (lambda array: array.tolist(), "array"),
        (lambda array: None, "array"),
        (lambda array: np.repeat(array, 2, axis=2)[..., ::2], "gaps"),
        (lambda array: array[:, ::-1], "revers"),
        (lambda array: array[::-1], "revers"),
        (lambda array: np.broadcast_to(array[:, :1], array.shape), "overlap"),
    ],
    ids=["rows", "tokens", "inner", "axes", "type", "bits", "list", "none", "gaps", "reversed", "rows", "broadcast"],
)
def test_arrays_that_do_not_fit(store: Store, change: Any, message: str) -> None:
    """The second of two arrays is wrong: the first has not been put either."""
    with store.write(IDS) as writer:
        given = values(writer, 0, 10)
        given["values"] = change(given["values"])
        with pytest.raises(WriteError, match=message) as error:
            writer.put(1, tokens=slice(0, 10), **given)
        assert "'values' of layer 1" in str(error.value)
        finish(writer, store)


@pytest.mark.parametrize("change", [lambda a: a[:3], lambda a: a.astype(np.float64), lambda a: np.zeros_like(a)[::-1]])
def test_states_that_do_not_fit(store: Store, change: Any) -> None:
    with store.write(IDS) as writer:
        given = states(writer, 40)
        given["recurrent"] = change(given["recurrent"])
        with pytest.raises(WriteError, match="'recurrent' of layer 0 at 40"):
            writer.put_state(0, at=40, **given)
        with pytest.raises(WriteError, match="window_keys"):
            writer.put_state(4, at=40, window_keys=np.zeros((2, 8, 4), np.float16))
        finish(writer, store)


def test_states_are_put_once_and_at_checkpoints_only(store: Store) -> None:
    with store.write(IDS, resume_at=(32, 40)) as writer:
        writer.put_state(0, at=32, **states(writer, 32))
        with pytest.raises(WriteError, match="put before"):
            writer.put_state(0, at=32, **states(writer, 32))
        for at in (0, 16, 31, 41, -1):
            with pytest.raises(WriteError, match="32, 40"):
                writer.put_state(0, at=at, **states(writer, 16))
        put_states(writer, 32, layer=2)
        put_states(writer, 32, layer=4)
        put_states(writer, 40)
        put_tokens(writer, 0, 40)
        writer.commit()
    assert store.match([*IDS, 1]).tokens == 40


def test_names_and_methods(store: Store) -> None:
    with store.write(IDS) as writer:
        with pytest.raises(SpecError, match="keys, values"):
            writer.put(1, tokens=slice(0, 10), latent=np.zeros(3))
        with pytest.raises(SpecError, match="no cache"):
            writer.put(17, tokens=slice(0, 10), keys=np.zeros(3))
        with pytest.raises(WriteError, match="use put_state"):
            writer.put(0, tokens=slice(0, 10), conv=np.zeros(3))
        with pytest.raises(WriteError, match="use put"):
            writer.put_state(1, at=40, keys=np.zeros(3))
        finish(writer, store)


def test_one_token_and_one_row_at_a_time(store: Store) -> None:
    """Strides of axes of one element are arbitrary: a new axis has stride 0."""
    with store.write(IDS) as writer:
        for position in range(40):
            for layer in (1, 3):
                given = values(writer, position, position + 1, layer)
                writer.put(
                    layer,
                    tokens=slice(position, position + 1),
                    keys=given["keys"][:, 0][:, None],
                    values=given["values"],
                )
        put_states(writer, 40)
        writer.commit()
    with store.read(store.match([*IDS, 1]), verify=True) as lease:
        check_lease(lease, writer.prompt)


def test_layouts_of_engines(store: Store) -> None:
    """Tokens outermost, rows of a larger buffer, and torch tensors are read where they lie."""
    torch = pytest.importorskip("torch")
    with store.write(IDS) as writer:
        for layer in (1, 3):
            given = values(writer, 0, 40, layer)
            tokens_first = np.ascontiguousarray(given["keys"].transpose(1, 0, 2)).transpose(1, 0, 2)
            buffer = torch.full((2, 100, 4), 7.0)
            buffer[:, 30:70] = torch.from_numpy(given["values"])
            writer.put(layer, tokens=slice(0, 40), keys=tokens_first, values=buffer[:, 30:70])
        for layer in (0, 2):
            given = states(writer, 40, layer)
            conv = torch.from_numpy(given["conv"].view(np.int16)).view(torch.bfloat16)
            writer.put_state(layer, at=40, conv=conv, recurrent=torch.from_numpy(given["recurrent"]))
        put_states(writer, 40, layer=4)
        writer.commit()
    with store.read(store.match([*IDS, 1]), verify=True) as lease:
        check_lease(lease, writer.prompt)
        into = torch.zeros(40, 2, 4).transpose(0, 1)
        lease.layer(1).copy_to(keys=into)
        assert np.array_equal(into.numpy(), values(writer, 0, 40)["keys"])
        with pytest.raises(LeaseError, match="overlap"):
            lease.layer(1).copy_to(keys=torch.zeros(1, 40, 4).expand(2, 40, 4))


def test_commit_wants_everything(store: Store) -> None:
    with store.write(IDS) as writer:
        put_tokens(writer, 0, 40)
        with pytest.raises(WriteError, match="group 'state', layers 0 to 2, at 40"):
            writer.commit()
        assert store.statistics().committed_bytes == 0
        writer.commit(32)
        assert store.match([*IDS, 1]).missing.attention_tokens == 32
        put_states(writer, 40)
        writer.commit()
    assert store.match([*IDS, 1]).tokens == 40


def test_blocks_appear_chunk_by_chunk_and_the_resume_point_with_its_states(store: Store) -> None:
    with store.write(IDS, resume_at=(32,)) as writer:
        for end in (16, 32):
            put_tokens(writer, end - 16, end)
            with pytest.raises(WriteError) if end == 32 else _nothing():
                writer.commit(end)
            assert not store.match([*IDS, 1])
        put_states(writer, 32)
        writer.commit(32)
        assert store.match([*IDS, 1]).tokens == 32


class _nothing:  # noqa: N801
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_an_ended_writer_takes_nothing(store: Store) -> None:
    writer = store.write(IDS)
    put_all(writer)
    writer.commit()
    for use in (
        lambda: writer.put(1, tokens=slice(0, 10), **values(writer, 0, 10)),
        lambda: writer.put_state(0, at=40, **states(writer, 40)),
        lambda: writer.commit(),
    ):
        with pytest.raises(WriteError, match="it was committed"):
            use()
    writer.abort()
    assert store.match([*IDS, 1]).tokens == 40


@pytest.mark.parametrize("end", ["abort", "leave", "raise", "drop"])
def test_what_was_not_committed_is_given_back(store: Store, end: str) -> None:
    writer = store.write(IDS)
    put_tokens(writer, 0, 40)
    writer.commit(16)
    kept = store.statistics().committed_bytes
    if end == "abort":
        writer.abort()
        writer.abort()
        with pytest.raises(WriteError, match="aborted by the caller"):
            put_states(writer, 40)
    elif end == "leave":
        with writer:
            pass
    elif end == "raise":
        with pytest.raises(KeyError), writer:
            raise KeyError
    del writer
    gc.collect()
    statistics = store.statistics()
    assert (statistics.committed_bytes, statistics.reserved_bytes, statistics.quarantined_bytes) == (kept, 0, 0)
    assert statistics.aborts == 1
    assert store.match([*IDS, 1]).missing.attention_tokens == 16


@pytest.mark.parametrize(
    ("resume_at", "message"),
    [
        ((41,), "41"),
        ((0,), "resume_at=0"),
        ((-16,), "-16"),
        ((17,), "multiple of block_tokens=16"),
        (tuple(range(16, 16 * (CHECKPOINTS_PER_WRITE_MAX + 2), 16)), str(CHECKPOINTS_PER_WRITE_MAX)),
    ],
)
def test_checkpoints_that_cannot_be(store: Store, resume_at: tuple[int, ...], message: str) -> None:
    with pytest.raises(WriteError, match=message):
        store.write(IDS, resume_at=resume_at)
    assert store.statistics().nodes == 0


def test_a_checkpoint_off_the_grid(store: Store) -> None:
    with pytest.raises(WriteError, match="no chunk boundary of grid=; the next is 24"):
        store.write(IDS, resume_at=(16,), grid=ChunkGrid.every(24, upto=40))


def test_a_grid_whose_last_chunk_goes_on_past_the_prompt(store: Store) -> None:
    """The prefill ended with the prompt, so its last chunk is not the longer one that the grid names."""
    with pytest.raises(WriteError, match=r"ends at 48, past the prompt's 40.*upto=40"):
        store.write(IDS, resume_at=(), grid=ChunkGrid.every(24, upto=48))
    assert store.statistics().nodes == 0


def test_a_prompt_shorter_than_a_block(store: Store) -> None:
    with pytest.raises(WriteError, match="fills no block of 16"):
        store.write([1, 2, 3], resume_at=())
    with store.write([1, 2, 3]) as writer:
        put_all(writer)
        writer.commit()
    assert store.match([1, 2, 3, 4]).tokens == 3
    assert not store.match([1, 2, 4, 4])
    with store.read(store.match([1, 2, 3, 4]), verify=True) as lease:
        check_lease(lease, writer.prompt)
    with pytest.raises(TokenError):
        store.write([])


def test_two_writers_of_one_prefix(store: Store) -> None:
    """Both may go on; the first commit wins, the second gives its records back and succeeds."""
    first, second = store.write(IDS), store.write([*IDS, *range(10)])
    size = store.statistics().reserved_bytes
    put_all(second)
    put_all(first)
    first.commit()
    committed = store.statistics().committed_bytes
    assert store.statistics().reserved_bytes == size - committed
    second.commit()
    assert store.match([*IDS, 1]).tokens == 40
    assert store.match([*IDS, *range(10), 1]).tokens == 50
    statistics = store.statistics()
    assert (statistics.reserved_bytes, statistics.quarantined_bytes) == (0, 0)
    # The second kept its own tail, its third block and its states; the first two blocks are shared.
    path = store.prompt([*IDS, *range(10)]).path
    own = sum(record.slot.size_bytes for record in second.transaction.records if record.name.node >= 2)
    assert statistics.committed_bytes == committed + own
    assert len(path) == 4
    third = store.write(IDS)
    assert third.size_bytes == 0
    third.commit()


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_what_is_given_back_while_nothing_moves_is_never_in_quarantine(
    store: Store, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or duplicate commits of busy threads would look like dropped writers, and have others refused."""
    seen = []
    give_back_all = Room.give_back_all

    def watch(self: Room, slots: SlotRows, salt: bytes) -> None:
        give_back_all(self, slots, salt)
        seen.append((len(slots), store.pool._tier.quarantined_bytes))

    with store.write(IDS) as first, store.write(IDS) as second:
        for writer in (first, second):
            put_all(writer)
        first.commit()
        monkeypatch.setattr(Room, "give_back_all", watch)
        second.commit() if end == "commit" else second.abort()
    assert seen == [(len(second.transaction.records), 0)]


def test_a_writer_continues_in_a_tail(store: Store) -> None:
    """The first whole block begins with the tail's pieces; nothing of it is put again."""
    longer = [*IDS, *range(500, 530)]
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    with store.read(store.match(longer)) as lease, store.write(longer, resume=lease, resume_at=(48, 70)) as writer:
        with pytest.raises(WriteError, match="32 to 40"):
            put_tokens(writer, 36, 44)
        put_all(writer, start=40)
        writer.commit()
    for tokens in (48, 70):
        with store.read(store.match([*longer, 1]).at(tokens), verify=True) as lease:
            check_lease(lease, store.prompt(longer))
    # The tail that it began with is there still.
    assert store.match([*IDS, 1, 2]).tokens == 40


def test_what_a_writer_builds_on_outlives_the_lease(store: Store) -> None:
    """An engine ends its lease once it has restored; the prefill that follows may take long."""
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    tail = writer.prompt.path.key(2)
    longer = [*IDS, *range(500, 530)]
    with store.read(store.match(longer)) as lease:
        writer = store.write(longer, resume=lease)
    assert store.pool.evict(tail) == store.pool.evict(tail, states_only=True) == 0
    put_all(writer, start=40)
    writer.commit()
    with store.read(store.match([*longer, 1]), verify=True) as lease:
        assert lease.tokens == 70
        check_lease(lease, writer.prompt)
    assert store.pool.evict(tail) > 0
    with store.read(store.match([*longer, 1])) as lease:
        writer = store.write([*longer, 1, 2, 3], resume=lease)
    writer.abort()
    assert store.pool.evict(store.prompt(longer).path.key(4)) > 0


def test_a_longer_tail_after_a_tail(store: Store) -> None:
    for length in (3, 5, 9):
        match = store.match([*IDS[:length], 1])
        with store.write(IDS[:length], resume=store.read(match) if match else None) as writer:
            put_all(writer, start=match.tokens)
            writer.commit()
        with store.read(store.match([*IDS[:length], 1]), verify=True) as lease:
            assert lease.tokens == length
            check_lease(lease, writer.prompt)


def test_resuming_from_what_is_no_beginning_of_the_prompt(store: Store) -> None:
    """Another prompt's tail would be copied into this one's block."""
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    other = [*IDS[:36], 9_999, 9_998, 9_997, 9_996, *range(20)]
    with store.read(store.match([*IDS, 1])) as lease:
        for ids, identity in (
            (other, {}),
            (IDS[:38], {}),
            ([5, *IDS[1:], 1, 2], {}),
            ([*IDS, 1], {"salt": b"other"}),
            ([*IDS, 1], {"extras": [ExtraInput(38, b"picture")]}),
        ):
            with pytest.raises(WriteError, match="beginning of this prompt"):
                store.write(ids, resume=lease, **identity)  # type: ignore[arg-type]
        with open_store(hybrid(B), dram="4MiB") as foreign, pytest.raises(WriteError, match="not of this store"):
            foreign.write([*IDS, 1], resume=lease)
    with pytest.raises(LeaseError, match="released"):
        store.write([*IDS, 1], resume=lease)
    assert store.statistics().reserved_bytes == 0


def test_resuming_on_another_grid(store: Store) -> None:
    """A record's grid covers all chunks from token 0, so what a writer builds on must be of its grid."""
    grid = ChunkGrid((8, 24, 40))
    with store.write(IDS, grid=grid) as writer:
        put_all(writer)
        writer.commit()
    longer = [*IDS, *range(20)]
    with store.read(store.match(longer)) as lease:
        for other, message in (
            (ChunkGrid((16, 40, 60)), "other chunk boundaries"),
            (ChunkGrid((32, 60)), "no chunk boundary of grid=; the next is 60"),
        ):
            with pytest.raises(WriteError, match=message):
                store.write(longer, resume=lease, grid=other)
        with store.write(longer, resume=lease, grid=ChunkGrid((8, 24, 40, 60))) as writer:
            put_all(writer, start=40)
            writer.commit()
    match = store.match([*longer, 1], grid=ChunkGrid((8, 24, 40, 60, 61)))
    with store.read(match, verify=True) as lease:
        assert lease.tokens == 60
        check_lease(lease, writer.prompt)


def test_resuming_where_another_number_of_workers_wrote(store: Store) -> None:
    for index in range(2):
        with store.write(IDS, shard=Shard(index, 2)) as writer:
            put_all(writer)
            writer.commit()
    longer = [*IDS, *range(20)]
    with store.read(store.match(longer)) as lease, store.write(longer, resume=lease) as writer:
        put_all(writer, start=40)
        writer.commit()
    with store.read(store.match([*longer, 1]), verify=True) as lease:
        assert lease.tokens == 60
        check_lease(lease, writer.prompt)
    # What two workers hold together need not be written again by one.
    with store.write(IDS) as writer:
        assert writer.size_bytes == 0
        writer.commit()


def test_nothing_of_an_earlier_record_is_left_in_the_padding() -> None:
    ids = list(range(48))
    with open_store(dense(B), dram="4MiB") as store:
        with store.write(ids) as writer:
            put_all(writer)
            writer.commit()
        store.pool.evict(writer.prompt.path.key(0))
        with store.write(ids[:3]) as writer:
            put_all(writer)
            writer.commit()
        with store.read(store.match(ids[:4]), verify=True) as lease:
            record = lease.record(lease.records[0])
            for layer in (0, 1, 2):
                for name in ("keys", "values"):
                    assert not record.tensor(layer, name)[:, 3:].any()


def test_a_hand_over_waits_at_the_prompts_end(store: Store) -> None:
    with store.write(IDS, resume_at=(32,)) as writer:
        put_all(writer)
        with pytest.raises(WriteError, match="not in resume_at"):
            writer.commit(handover=HandOver(1))
    with store.write(IDS) as writer:
        put_all(writer)
        with pytest.raises(WriteError, match="whole prompt"):
            writer.commit(32, handover=HandOver(1))
        with pytest.raises(WriteError, match=str(HANDOVER_PAYLOAD_BYTES_MAX)):
            writer.commit(handover=HandOver(1, bytes(HANDOVER_PAYLOAD_BYTES_MAX + 1)))
        writer.commit(handover=HandOver(1))
    assert store.accept(IDS).result(0.0).handover == HandOver(1)


def test_listeners_hear_everything_once(store: Store) -> None:
    class Listener:
        def __init__(self) -> None:
            self.pieces: dict[int, list[int]] = {}
            self.sealed: dict[int, int] = {}
            self.ends: list[object] = []

        def pieces_whole(self, record: int, pieces: Any) -> None:
            self.pieces.setdefault(record, []).extend(pieces.tolist())

        def record_sealed(self, record: int, cost_us: int) -> None:
            assert record not in self.sealed
            self.sealed[record] = cost_us

        def committed(self, upto_tokens: int, handover: object) -> None:
            self.ends.append(upto_tokens)

        def aborted(self, reason: str) -> None:
            self.ends.append(reason)

    early, late = Listener(), Listener()
    with store.write(IDS) as writer:
        writer.subscribe(early)
        put_tokens(writer, 0, 20)
        writer.put(1, tokens=slice(20, 40), cost_s=0.5, **values(writer, 20, 40))
        writer.subscribe(late)
        put_tokens(writer, 20, 40, layer=3)
        put_states(writer, 40)
        writer.commit()
    for listener in (early, late):
        for number, record in enumerate(writer.transaction.records):
            assert sorted(listener.pieces[number]) == list(range(len(record.layout.pieces)))
        assert sorted(listener.sealed) == list(range(len(writer.transaction.records)))
        assert listener.ends == [40]
        # 20 tokens took half a second; 12 of them lie in the second block, 8 in the tail.
        by_node = {
            writer.transaction.records[number].name.node: cost
            for number, cost in listener.sealed.items()
            if writer.transaction.records[number].layout.group.name == "attention"
        }
        assert by_node == {0: 0, 1: 300_000, 2: 200_000}
