"""Hand-over between two stores: prefilled by one model object, decoded by another, as by one alone."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvstore.adapters.transformers import CachedModel, Sampling  # noqa: E402
from kvstore.errors import (  # noqa: E402
    DeadlineError,
    PeerGoneError,
    PeerMismatchError,
    PoolFullError,
    ProtocolError,
    TransferFullError,
)
from kvstore.pool import HandOver  # noqa: E402
from kvstore.spec import ModelSpec  # noqa: E402
from kvstore.store import open_store  # noqa: E402
from tests.models.tiny import TINY, build_tiny  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.store import Store

BLOCK_TOKENS = 8
CHUNK_TOKENS = 16
STEPS = 5
DEADLINE_S = 20.0
ADDRESSES = {"memory": "memory://handover-test", "tcp": "tcp://127.0.0.1:0"}


def spec_of(model: Any, weights: str = "test") -> ModelSpec:
    return ModelSpec.from_transformers(model.config, weights=weights, block_tokens=BLOCK_TOKENS, dtype=model.dtype)


def prompt(tokens: int, seed: int = 0) -> Any:
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return build_tiny("qwen3_5")


class Pair:
    """A prefill node, a decode node that listens, and a node that does both alone."""

    def __init__(self, model: Any, transport: str, stack: ExitStack) -> None:
        def opened() -> Store:
            return stack.enter_context(open_store(spec_of(model), dram="32MiB"))

        self.prefill_store, self.decode_store = opened(), opened()
        self.address = self.decode_store.listen(ADDRESSES[transport]).address
        self.prefill = CachedModel(model, self.prefill_store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
        self.decode = CachedModel(model, self.decode_store, chunk_tokens=CHUNK_TOKENS, strict_store=True)
        self.alone = CachedModel(model, opened(), chunk_tokens=CHUNK_TOKENS, strict_store=True)

    def check(self, ids: Any) -> Any:
        """Hand a prompt over, decode it there, and compare with one model alone."""
        handed = self.prefill.hand_over(ids, self.address)
        report = handed.wait(DEADLINE_S)
        answer = self.decode.resume(ids, STEPS, deadline_s=DEADLINE_S, keep_logits=True)
        expected = self.alone.generate(ids, STEPS, keep_logits=True)
        assert report.tokens == len(ids)
        assert answer.resumed_tokens == len(ids)
        assert answer.tokens == expected.tokens
        assert answer.tokens[0] == handed.first_token
        assert torch.equal(answer.logits, expected.logits)
        return handed


@pytest.fixture(params=sorted(ADDRESSES))
def pair(hybrid: Any, request: Any) -> Iterator[Pair]:
    with ExitStack() as stack:
        made = Pair(hybrid, request.param, stack)
        yield made
        for store in (made.prefill_store, made.decode_store):
            store.pool.check()


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_is_handed_over(name: str) -> None:
    with ExitStack() as stack:
        Pair(build_tiny(name), "memory", stack).check(prompt(43))


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16, 17, 47, 48, 49, 64])
def test_any_length_around_blocks_and_chunks_is_handed_over(pair: Pair, tokens: int) -> None:
    pair.check(prompt(tokens))


def test_a_second_turn_reuses_on_both_sides(pair: Pair) -> None:
    first = prompt(61, seed=1)
    pair.check(first)
    second = torch.cat([first[:50], prompt(30, seed=2)])
    handed = pair.check(second)
    assert handed.prefilled.resumed_tokens == 48
    assert handed.wait(0.0).pieces_skipped > 0, "what the other side has does not cross again"


def test_a_node_that_has_none_of_the_reused_prefix_gets_it_too(pair: Pair, hybrid: Any) -> None:
    ids = prompt(61, seed=1)
    pair.prefill.prefill(ids)
    handed = pair.check(ids)
    assert handed.prefilled.resumed_tokens == 48
    assert handed.wait(0.0).pieces_skipped == 0


def test_records_of_other_chunks_at_the_receiver_do_not_mix_in(pair: Pair, hybrid: Any) -> None:
    ids = prompt(61, seed=4)
    CachedModel(hybrid, pair.decode_store, chunk_tokens=40, strict_store=True).prefill(ids)
    pair.check(ids)


def test_the_senders_chunks_decide_where_they_differ(pair: Pair, hybrid: Any) -> None:
    ids = prompt(61, seed=4)
    other = CachedModel(hybrid, pair.decode_store, chunk_tokens=40, strict_store=True)
    pair.prefill.hand_over(ids, pair.address).wait(DEADLINE_S)
    answer = other.resume(ids, STEPS, deadline_s=DEADLINE_S, keep_logits=True)
    assert torch.equal(answer.logits, pair.alone.generate(ids, STEPS, keep_logits=True).logits)


def test_a_handover_is_taken_once(pair: Pair) -> None:
    ids = prompt(40)
    pair.check(ids)
    with pytest.raises(DeadlineError):
        pair.decode.resume(ids, 2, deadline_s=0.05)
    pair.check(ids)


def test_sampling_goes_on_with_the_same_draws(pair: Pair) -> None:
    ids, sampling = prompt(40), Sampling(temperature=1.3, seed=5)
    pair.prefill.hand_over(ids, pair.address, sampling=sampling).wait(DEADLINE_S)
    answer = pair.decode.resume(ids, 12, deadline_s=DEADLINE_S, sampling=sampling)
    assert answer.tokens == pair.alone.generate(ids, 12, sampling=sampling).tokens


def test_logits_stay_at_home_if_wanted(pair: Pair) -> None:
    ids = prompt(40)
    pair.prefill.hand_over(ids, pair.address, with_logits=False).wait(DEADLINE_S)
    answer = pair.decode.resume(ids, STEPS, deadline_s=DEADLINE_S, keep_logits=True)
    expected = pair.alone.generate(ids, STEPS, keep_logits=True)
    assert answer.tokens == expected.tokens
    assert torch.equal(answer.logits, expected.logits[1:])


def test_the_decoding_side_may_wait_first(pair: Pair) -> None:
    import threading

    ids = prompt(40)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(pair.decode.resume(ids, STEPS, deadline_s=DEADLINE_S)))
    waiting.start()
    pair.prefill.hand_over(ids, pair.address).wait(DEADLINE_S)
    waiting.join(DEADLINE_S)
    assert answers[0].tokens == pair.alone.generate(ids, STEPS).tokens


def test_a_prefix_can_be_sent_without_being_handed_over(pair: Pair) -> None:
    ids = prompt(61)
    prefilled = pair.prefill.prefill(ids, checkpoints=(32, 48), send_to=pair.address)
    assert prefilled.transfer is not None
    assert prefilled.transfer.result(DEADLINE_S).tokens == 48
    answer = pair.decode.generate(ids, STEPS, keep_logits=True)
    assert answer.resumed_tokens == 48
    assert torch.equal(answer.logits, pair.alone.generate(ids, STEPS, keep_logits=True).logits)


def lenient(model: Any, store: Store) -> CachedModel:
    return CachedModel(model, store, chunk_tokens=CHUNK_TOKENS)


def check_goes_on_at_home(pair: Pair, cached: CachedModel, handed: Any, ids: Any) -> None:
    answer = cached.continue_from(handed.prefilled, STEPS, keep_logits=True)
    expected = pair.alone.generate(ids, STEPS, keep_logits=True)
    assert answer.tokens[0] == handed.first_token
    assert torch.equal(answer.logits, expected.logits)


def test_a_receiver_that_is_not_there_fails_the_transfer_only(pair: Pair, hybrid: Any) -> None:
    ids = prompt(40)
    cached = lenient(hybrid, pair.prefill_store)
    address = "memory://nobody" if pair.address.startswith("memory") else "tcp://127.0.0.1:1"
    handed = cached.hand_over(ids, address)
    with pytest.raises(PeerGoneError):
        handed.wait(DEADLINE_S)
    assert handed.prefilled.stored_tokens == 40, "it is stored here all the same"
    check_goes_on_at_home(pair, cached, handed, ids)


def test_a_receiver_without_room_fails_the_transfer_only(pair: Pair, hybrid: Any) -> None:
    ids = prompt(300)
    with open_store(pair.decode_store.spec, dram="128KiB") as small:
        cached = lenient(hybrid, pair.prefill_store)
        handed = cached.hand_over(ids, small.listen("memory://small").address)
        with pytest.raises(TransferFullError):
            handed.wait(DEADLINE_S)
        small.pool.check()
    check_goes_on_at_home(pair, cached, handed, ids)


def test_a_receiver_with_other_weights_is_refused(pair: Pair, hybrid: Any) -> None:
    with open_store(spec_of(hybrid, "other"), dram="8MiB") as other:
        address = other.listen("memory://other-weights").address
        handed = lenient(hybrid, pair.prefill_store).hand_over(prompt(40), address)
        with pytest.raises(PeerMismatchError):
            handed.wait(DEADLINE_S)


def test_a_sender_without_room_says_so_and_decodes_itself(pair: Pair, hybrid: Any) -> None:
    ids = prompt(300)
    with open_store(pair.prefill_store.spec, dram="128KiB") as small:
        cached = lenient(hybrid, small)
        handed = cached.hand_over(ids, pair.address)
        assert handed.transfer is None
        with pytest.raises(PoolFullError):
            handed.wait(DEADLINE_S)
        check_goes_on_at_home(pair, cached, handed, ids)


def test_a_failed_prefill_aborts_the_transfer(pair: Pair, hybrid: Any) -> None:
    calls = []

    def fail(module: Any, arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = hybrid.model.layers[3].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            pair.prefill.hand_over(prompt(61), pair.address)
    finally:
        hook.remove()
    with pytest.raises(DeadlineError):
        pair.decode.resume(prompt(61), 2, deadline_s=0.2)
    statistics = pair.prefill_store.statistics()
    assert (statistics.committed_bytes, statistics.reserved_bytes) == (0, 0)


def test_logits_of_another_vocabulary_are_refused(hybrid: Any) -> None:
    ids = prompt(16)
    with open_store(spec_of(hybrid), dram="8MiB") as store:
        cached = lenient(hybrid, store)
        prompted = store.prompt(ids)
        with store.write(prompted, resume_at=(16,)) as writer:
            for layer in store.spec.layers:
                for group in store.spec.groups:
                    if layer not in group.layers:
                        continue
                    tensors = {tensor.name: torch.zeros(tensor.shape(tensor.rows, 16)) for tensor in group.tensors}
                    if group.name == "attention":
                        writer.put(layer, tokens=slice(0, 16), **tensors)
                    else:
                        writer.put_state(layer, at=16, **tensors)
            writer.commit(handover=HandOver(5, b"1234"))
        with pytest.raises(ProtocolError, match="4 bytes of logits, expected 512"):
            cached.resume(ids, 2, deadline_s=1.0)
