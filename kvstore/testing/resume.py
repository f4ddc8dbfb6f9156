"""Resume equivalence: a model that goes on from stored records computes what it would have without a store.

    def test_my_model() -> None:
        report = check_resume_equivalence(model, lambda: kvstore.open(spec, dram="64MiB"), chunk_tokens=64)
        print(report)

For prompts that share any length with a stored one, after any of the stored records are gone: the store
must find exactly the deepest resume point that is left, and the logits from there on must equal those of
an uncached run with the same chunk boundaries, bit for bit. The comparison itself is tested by negative
controls (`kvstore.testing.resume_controls`): each damage to the restored cache must change the logits.

Needs torch and transformers (`pip install kvstore[transformers]`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.testing.resume_controls import Control, check_controls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from kvstore.adapters.transformers import CachedModel
    from kvstore.pool import Prompt
    from kvstore.spec import ModelSpec
    from kvstore.store import Store

DECODED_TOKENS = 3


@dataclass(frozen=True)
class Drop:
    """Stored records that are removed before the prompt is matched.

    Attributes:
        end_tokens: end of the prefix whose records go; a block boundary.
        states_only: only the states there; otherwise its attention block, and all that lies below.
    """

    end_tokens: int
    states_only: bool

    def __str__(self) -> str:
        return f"{'states' if self.states_only else 'everything'} at {self.end_tokens}"


@dataclass(frozen=True)
class ResumeCase:
    """One prompt against one stored prompt.

    Attributes:
        shared_tokens: length of the prefix that both have.
        checkpoints: lengths at which the stored prompt's states were kept.
        drops: what was removed.
        resumed_tokens: where the prompt was resumed, which is where it had to be.
    """

    shared_tokens: int
    checkpoints: tuple[int, ...]
    drops: tuple[Drop, ...]
    resumed_tokens: int

    def __str__(self) -> str:
        dropped = ", ".join(str(drop) for drop in self.drops) or "nothing"
        kept = ", ".join(str(length) for length in self.checkpoints) or "none"
        return f"shares {self.shared_tokens}, states at {kept}, dropped {dropped}: resumed at {self.resumed_tokens}"


@dataclass(frozen=True)
class ResumeReport:
    """What was checked; all of it held, or `check_resume_equivalence` would have raised."""

    cases: tuple[ResumeCase, ...]
    controls: tuple[Control, ...]

    def __str__(self) -> str:
        return "\n".join([*(f"equal: {case}" for case in self.cases), *(f"noticed: {item}" for item in self.controls)])


def check_resume_equivalence(
    model: torch.nn.Module,
    make_store: Callable[[], Store],
    *,
    chunk_tokens: int,
    prompt_tokens: int | None = None,
    random_cases: int = 3,
    seed: int = 0,
    trust_spec: bool = False,
) -> ResumeReport:
    """Check a model against a store: fixed cases, random cases, negative controls.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.
        make_store: opens an empty store for the model's spec, with room for a few prompts.
        chunk_tokens: tokens of a prefill chunk; a multiple of the spec's `block_tokens`.
        prompt_tokens: length of the prompts; by default five and a half chunks.
        random_cases: cases with random split points, checkpoints and removed records.
        seed: of the prompts and the random cases.
        trust_spec: the spec was written by hand.

    Raises:
        AssertionError: the store found another resume point than it should, logits differ, or a control
            went unnoticed; the message names the case.
    """
    bench = _Bench(model, make_store, chunk_tokens, prompt_tokens or chunk_tokens * 11 // 2, seed, trust_spec)
    boundaries = bench.boundaries
    deepest, middle = boundaries[-1], boundaries[len(boundaries) // 2]
    fixed: list[tuple[int, tuple[int, ...], tuple[Drop, ...]]] = [
        (bench.prompt_tokens - 1, boundaries, ()),
        (middle, boundaries, ()),
        (middle - 1, boundaries, ()),
        (middle + 1, (middle, deepest), ()),
        (0, boundaries, ()),
        (deepest, boundaries, (Drop(deepest, states_only=True),)),
        (deepest, boundaries, (Drop(middle, states_only=False),)),
        (deepest, boundaries, (Drop(boundaries[0], states_only=False),)),
    ]
    source = random.Random(seed)
    cases = [bench.check(shared, checkpoints, drops) for shared, checkpoints, drops in fixed]
    cases += [bench.check(*random_case(source, bench.prompt_tokens, boundaries)) for _ in range(random_cases)]
    return ResumeReport(tuple(cases), bench.controls())


def random_case(
    source: random.Random, prompt_tokens: int, boundaries: Sequence[int]
) -> tuple[int, tuple[int, ...], tuple[Drop, ...]]:
    """Shared length, checkpoints and drops of a random case."""
    kept = {length for length in boundaries if source.random() < 0.7} | {boundaries[-1]}
    drops = tuple(Drop(length, states_only=source.random() < 0.7) for length in boundaries if source.random() < 0.25)
    return source.randrange(prompt_tokens), tuple(sorted(kept)), drops


def check_resume_case(
    model: torch.nn.Module,
    make_store: Callable[[], Store],
    *,
    chunk_tokens: int,
    prompt_tokens: int,
    shared_tokens: int,
    checkpoints: Sequence[int],
    drops: Sequence[Drop],
    seed: int = 0,
    trust_spec: bool = False,
) -> ResumeCase:
    """One case alone, for property tests that choose their own.

    Args:
        model, make_store, chunk_tokens, prompt_tokens, seed, trust_spec: as `check_resume_equivalence`.
        shared_tokens: length of the prefix that the two prompts share, below `prompt_tokens`.
        checkpoints: multiples of `chunk_tokens` below `prompt_tokens`.
        drops: what to remove.

    Raises:
        AssertionError: as `check_resume_equivalence`.
    """
    bench = _Bench(model, make_store, chunk_tokens, prompt_tokens, seed, trust_spec)
    return bench.check(shared_tokens, tuple(checkpoints), tuple(drops))


class _Bench:
    """A model, a prompt, and the logits of its uncached run."""

    def __init__(
        self,
        model: torch.nn.Module,
        make_store: Callable[[], Store],
        chunk_tokens: int,
        prompt_tokens: int,
        seed: int,
        trust_spec: bool,
    ) -> None:
        from kvstore.adapters.transformers import Decoder

        self.prompt_tokens = prompt_tokens
        self._model = model
        self._make_store = make_store
        self._chunk_tokens = chunk_tokens
        self._trust_spec = trust_spec
        self._decoder = Decoder(model)
        source = random.Random(seed)
        self._vocabulary = self._decoder.vocabulary
        self._ids = [source.randrange(self._vocabulary) for _ in range(prompt_tokens)]
        self.boundaries = tuple(range(chunk_tokens, prompt_tokens, chunk_tokens))
        if not self.boundaries:
            raise ValueError(f"a prompt of {prompt_tokens} tokens has no chunk of {chunk_tokens} to resume after")
        self._expected = self._uncached()

    def _uncached(self) -> list[torch.Tensor]:
        from transformers import DynamicCache

        config: Any = self._model.config
        return self._decoder.continue_prompt(
            DynamicCache(config=config), self._ids, 0, self._chunk_tokens, DECODED_TOKENS
        )

    def _cached_model(self, store: Store) -> CachedModel:
        from kvstore.adapters.transformers import CachedModel

        if self._chunk_tokens % store.spec.block_tokens:
            raise ValueError(
                f"chunk_tokens={self._chunk_tokens} is no multiple of the spec's block_tokens={store.spec.block_tokens}"
            )
        return CachedModel(
            self._model, store, chunk_tokens=self._chunk_tokens, strict_store=True, trust_spec=self._trust_spec
        )

    def check(self, shared_tokens: int, checkpoints: tuple[int, ...], drops: tuple[Drop, ...]) -> ResumeCase:
        """Store a prompt, remove records, and resume another prompt."""
        stored_ids = [*self._ids[:shared_tokens], *(self._other(token) for token in self._ids[shared_tokens:])]
        with self._make_store() as store:
            cached = self._cached_model(store)
            has_states = bool(store.spec.state_groups)
            cached.prefill(stored_ids, checkpoints=checkpoints if has_states else None)
            stored = store.prompt(stored_ids)
            for drop in drops:
                _drop(store, stored, drop)
            expected_tokens = _expected_tokens(store.spec, self.boundaries, shared_tokens, checkpoints, drops)
            answer = cached.generate(self._ids, DECODED_TOKENS + 1, keep_logits=True)
            store.pool.check()
        case = ResumeCase(shared_tokens, checkpoints if has_states else (), drops, answer.resumed_tokens)
        found = answer.resumed_tokens
        if found != expected_tokens:
            what = "deeper than anything that is left" if found > expected_tokens else "not the deepest that is left"
            raise AssertionError(f"{case}, which is {what}; expected {expected_tokens}")
        assert answer.logits is not None
        for step, logits in enumerate(self._expected[-(DECODED_TOKENS + 1) :]):
            row = logits.detach().cpu().float()
            if not row.equal(answer.logits[step]):
                difference = float((row - answer.logits[step]).abs().max())
                raise AssertionError(
                    f"{case}, and the logits of decoded token {step} differ from those of the uncached run by up to "
                    f"{difference:.3g}"
                )
        return case

    def _other(self, token: int) -> int:
        return (token + 1) % self._vocabulary

    def controls(self) -> tuple[Control, ...]:
        """Damage a restored cache in every applicable way."""
        other_ids = [self._other(token) for token in self._ids]
        with self._make_store() as store:
            cached = self._cached_model(store)
            for ids in (self._ids, other_ids):
                cached.prefill(ids, checkpoints=self.boundaries if store.spec.state_groups else None)
            return check_controls(
                self._model, store, self._ids, other_ids, self.boundaries, self._chunk_tokens, DECODED_TOKENS
            )


def _drop(store: Store, prompt: Prompt, drop: Drop) -> None:
    node = prompt.path.node_at(drop.end_tokens)
    if node is None:
        raise ValueError(f"no block of the stored prompt ends at {drop.end_tokens} tokens")
    store.pool.evict(prompt.path.key(node), states_only=drop.states_only)


def _expected_tokens(
    spec: ModelSpec,
    boundaries: Sequence[int],
    shared_tokens: int,
    checkpoints: Sequence[int],
    drops: Sequence[Drop],
) -> int:
    """Where the prompt must be resumed, worked out without the index."""
    cut = min((drop.end_tokens for drop in drops if not drop.states_only), default=shared_tokens + 1)
    without_states = {drop.end_tokens for drop in drops if drop.states_only}
    possible = boundaries
    if spec.state_groups:
        possible = [length for length in checkpoints if length not in without_states]
    return max((length for length in possible if length <= shared_tokens and length < cut), default=0)
