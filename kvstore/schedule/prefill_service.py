"""How a prompt is prefilled on an instance: whole, in chunks of tokens (SARATHI), or in groups of layers.

Pure functions of a profile. Sources: Agrawal et al., "SARATHI: Efficient LLM Inference by Piggybacking Decodes with
Chunked Prefills" (arXiv 2308.16369); "From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with
Layered Prefill" (arXiv 2510.08055).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from kvstore.errors import PlanError
from kvstore.limits import PREFILL_PIECE_TOKENS_MIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.profile import Curve, KvSize, Profile

ServiceKind: TypeAlias = Literal["whole", "chunked", "layered"]


@dataclass(frozen=True, slots=True)
class PrefillService:
    """What one prompt costs, and those beside it.

    Attributes:
        pieces: after each of which the instance may turn to something else; 0 where nothing is left to compute.
        prefill_s: from the first piece to the end of the last, the decode steps between them included.
        piece_s: the longest piece: what a prompt or a decode step that comes meanwhile waits for, at most.
        decode_step_s: one token of each request that decodes on the same instance meanwhile; without any, 0.
        states_from_s: when the first bytes of states are final. They follow evenly from there to `prefill_s`;
            attention blocks leave evenly from the beginning.
    """

    pieces: int
    prefill_s: float
    piece_s: float
    decode_step_s: float
    states_from_s: float


@dataclass(frozen=True, slots=True)
class ChunkedCurve:
    """T of prompts from their first token on, prefilled in chunks by an instance that does nothing else.

    What `PrefillServiceModel.service` adds up for one prompt, for many at once.

    Attributes:
        whole: T of a prompt in one piece.
        piece_tokens: of a chunk.
    """

    whole: Curve
    piece_tokens: int

    def __call__(self, tokens: float) -> float:
        """Seconds for one positive length."""
        return float(self.many(np.array([tokens], np.float64))[0])

    def many(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds for many positive lengths, same shape."""
        chunks = np.ceil(tokens / self.piece_tokens).astype(np.int64) - 1
        ends_s = self.whole.many(self.piece_tokens * np.arange(1.0, chunks.max(initial=0) + 1.0))
        ends_s = np.concatenate(([0.0], ends_s))
        upto_s = np.concatenate(([0.0], np.cumsum(np.maximum(self.whole(self.piece_tokens), np.diff(ends_s)))))
        last_tokens = tokens - self.piece_tokens * chunks
        last_s = np.maximum(self.whole.many(last_tokens), self.whole.many(tokens) - ends_s[chunks])
        seconds: NDArray[np.float64] = upto_s[chunks] + last_s
        return seconds


@dataclass(frozen=True, slots=True)
class PrefillServiceModel:
    """Which of the three, and how large its pieces are.

    `whole`: one piece, T(l). Whoever decodes on the same instance stands still until it ends.

    `chunked`: pieces of `piece_tokens` tokens. A chunk costs what `Profile.prefill_s` says for its tokens behind those
    before it, so it is never cheaper than a prompt of its own length: the weights are read again for each. A linear
    state is final with the last chunk only, so none of its bytes can leave earlier.

    `layered`: as many groups of layers as there are `piece_tokens` in the prompt, at most `layer_groups_max`; all
    tokens pass one group per piece. Nothing is computed or read twice, and the states of a group are final with it.

    Where an instance decodes as well, one step of the whole batch runs with each piece; both are added. A step that
    rides along in a chunk costs less than that in truth, so `prefill_s` and `decode_step_s` are upper bounds.

    Raises:
        PlanError: the kind is unknown, or a number is out of its limits.
    """

    kind: ServiceKind = "whole"
    piece_tokens: int = 2048
    layer_groups_max: int = 16

    def __post_init__(self) -> None:
        if self.kind not in get_args(ServiceKind):
            raise PlanError(f"prefill service {self.kind!r} is unknown; there are {', '.join(get_args(ServiceKind))}")
        if self.piece_tokens < PREFILL_PIECE_TOKENS_MIN:
            raise PlanError(
                f"pieces of {self.piece_tokens} tokens are fewer than {PREFILL_PIECE_TOKENS_MIN}; a chunk that small "
                "spends its time on reading weights"
            )
        if self.layer_groups_max < 1:
            raise PlanError(f"layer_groups_max={self.layer_groups_max} must be at least 1; use the number of layers")

    def curve(self, profile: Profile) -> Curve | ChunkedCurve:
        """Seconds by length, of prompts without a prefix, on an instance that does nothing else."""
        return ChunkedCurve(profile.prefill, self.piece_tokens) if self.kind == "chunked" else profile.prefill

    def held_bytes(self, kv: KvSize, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """What of the KVCache of prompts of these lengths is counted as leaving only when prefill ends; same shape.

        An upper bound: states of a chunked prompt are final within its last chunk, which may be its only one.
        """
        return kv.resume_many(tokens) if self.kind == "chunked" else np.zeros_like(tokens)

    def service(
        self, profile: Profile, tokens: float, present_tokens: float = 0.0, decode_batch: int = 0
    ) -> PrefillService:
        """The cost of one prompt.

        Args:
            tokens: of the whole prompt.
            present_tokens: of its prefix that need not be computed.
            decode_batch: requests that decode on the same instance meanwhile; 0 where it only prefills.
        """
        whole_s = profile.prefill_s(tokens, present_tokens)
        missing_tokens = tokens - present_tokens
        step_s = profile.decode_step(decode_batch) if decode_batch > 0 else 0.0
        if missing_tokens <= 0:
            return PrefillService(0, 0.0, 0.0, step_s, 0.0)
        pieces = 1 if self.kind == "whole" else ceil(missing_tokens / self.piece_tokens)
        if self.kind == "layered":
            pieces = min(pieces, self.layer_groups_max)
        if pieces == 1:
            beside_s = whole_s + step_s if decode_batch > 0 else 0.0
            return PrefillService(1, whole_s, whole_s, beside_s, 0.0)
        if self.kind == "chunked":
            compute_s, piece_s, last_s = self._chunks(profile, tokens, present_tokens, pieces)
            states_from_s = compute_s + (pieces - 1) * step_s - last_s
        else:
            compute_s, piece_s, states_from_s = whole_s, whole_s / pieces, 0.0
        # The step of the last piece ends with or after the prompt's own work, and is no part of it.
        prefill_s = compute_s + (pieces - 1) * step_s
        beside_s = piece_s + step_s if decode_batch > 0 else 0.0
        return PrefillService(pieces, prefill_s, piece_s, beside_s, states_from_s)

    def _chunks(
        self, profile: Profile, tokens: float, present_tokens: float, chunks: int
    ) -> tuple[float, float, float]:
        """Seconds of all chunks, of the longest and of the last, each as `Profile.prefill_s` has it."""
        curve, piece_tokens = profile.prefill, self.piece_tokens
        alone_s = curve(piece_tokens)
        begin_tokens = present_tokens
        begin_s = curve(begin_tokens) if begin_tokens > 0 else 0.0
        total_s = longest_s = 0.0
        for _ in range(chunks - 1):
            begin_tokens += piece_tokens
            end_s = curve(begin_tokens)
            chunk_s = max(alone_s, end_s - begin_s)
            total_s += chunk_s
            longest_s = max(longest_s, chunk_s)
            begin_s = end_s
        last_s = profile.prefill_s(tokens, begin_tokens)
        return total_s + last_s, max(longest_s, last_s), last_s


WHOLE = PrefillServiceModel()
