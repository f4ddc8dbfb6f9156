"""What one measurement moves: records of one size, or those of a model's prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvstore.bench.shapes import SHAPES, WEIGHTS, shape
from kvstore.errors import BenchmarkError
from kvstore.limits import KIB, MIB, OFFER_RECORDS_MAX, PROMPT_TOKENS_MAX, RECORD_BYTES_MAX, SHARD_UNITS_MAX
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec, load_spec
from kvstore.units import format_bytes, parse_bytes

PIECE_BYTES_DEFAULT = 16 * KIB
"""One KV head of 128 elements in bfloat16 over 64 tokens."""
BLOCK_TOKENS = 64
ROUND_BYTES = 64 * MIB
"""A round of a small case moves about this much, as batches one after the other."""
BATCHES_MAX = 64
CASES_DEFAULT = ("64KiB", "1MiB", "16MiB", "256x1MiB", "4096x64KiB")
_NOTATION = re.compile(r"\s*(?:([0-9]+)\s*x\s*)?([0-9.]+\s*[A-Za-z]*)\s*")


@dataclass(frozen=True)
class Case:
    """The records of a prompt of a model.

    A round moves `batches` prompts, one after the other, each timed by itself; they have memory of their own, so
    that a small case is no measurement of one cache line.

    Attributes:
        name: for the table: `256 x 1 MiB`.
        spec: the model whose cache it is.
        tokens: length of the prompt; whole blocks.
    """

    name: str
    spec: ModelSpec
    tokens: int

    @cached_property
    def record_bytes(self) -> tuple[int, ...]:
        """Bytes of each record, of all its pieces; headers not counted."""
        return record_sizes_bytes(self.spec, self.tokens)

    @property
    def total_bytes(self) -> int:
        return sum(self.record_bytes)

    @property
    def gigabytes(self) -> float:
        return self.total_bytes / 1e9

    @property
    def batches(self) -> int:
        return max(1, min(BATCHES_MAX, ROUND_BYTES // self.total_bytes))


def record_sizes_bytes(spec: ModelSpec, tokens: int) -> tuple[int, ...]:
    """Sizes of the records that make up a resume point of whole blocks: attention per block, states once.

    A window's record has its full size from the first token on.
    """
    sizes: list[int] = []
    for index, group in enumerate(spec.groups):
        times = tokens // spec.block_tokens if group.rule is ReuseRule.ATTENTION else 1
        layer_bytes = group.layer_bytes(spec.block_tokens)
        sizes.extend(times * [layer_bytes * len(span.layers) for span in spec.spans[index]])
    return tuple(sizes)


def sized_case(count: int, size_bytes: int, piece_bytes: int = PIECE_BYTES_DEFAULT) -> Case:
    """`count` records of one size: blocks of one layer, whose keys and values are pieces of `piece_bytes`.

    Raises:
        BenchmarkError: too large, too many, or a size that does not divide into pieces.
    """
    piece_bytes = min(piece_bytes, size_bytes // 2)
    units, rest = divmod(size_bytes, 2 * piece_bytes) if piece_bytes else (0, 1)
    if rest or piece_bytes % BLOCK_TOKENS:
        raise BenchmarkError(
            f"a record of {size_bytes} bytes does not divide into keys and values in pieces of {piece_bytes}, a "
            f"multiple of {BLOCK_TOKENS}; choose a multiple of {format_bytes(2 * PIECE_BYTES_DEFAULT)}, or another "
            "--piece"
        )
    if size_bytes > RECORD_BYTES_MAX:
        raise BenchmarkError(
            f"a record of {format_bytes(size_bytes)} is above the limit of {format_bytes(RECORD_BYTES_MAX)}; move "
            "more by several records: 4x64MiB"
        )
    if units > SHARD_UNITS_MAX:
        raise BenchmarkError(
            f"{units} pieces of {piece_bytes} bytes for keys and as many for values are above the limit of "
            f"{SHARD_UNITS_MAX}; choose a larger --piece"
        )
    count_max = min(OFFER_RECORDS_MAX, PROMPT_TOKENS_MAX // BLOCK_TOKENS - 1)
    if not 1 <= count <= count_max:
        raise BenchmarkError(f"{count} records are not from 1 to {count_max}, what one transfer moves")
    segments = (Segment("heads", units, 1),)
    tensors = tuple(
        TensorSpec(name, DType.UINT8, segments, (piece_bytes // BLOCK_TOKENS,), has_tokens=True)
        for name in ("keys", "values")
    )
    group = CacheGroup("attention", ReuseRule.ATTENTION, (0,), tensors)
    spec = ModelSpec("benchmark", WEIGHTS, BLOCK_TOKENS, (group,))
    size = format_bytes(size_bytes).replace(".00", "")
    return Case(size if count == 1 else f"{count} x {size}", spec, count * BLOCK_TOKENS)


def parse_sized(notations: list[str], counts: list[int], piece_bytes: int = PIECE_BYTES_DEFAULT) -> list[Case]:
    """Cases of sizes as people write them: `256x1MiB`, or `64KiB`, of which each of `counts` is taken.

    Raises:
        BenchmarkError: no such notation, or as `sized_case`.
    """
    cases: list[Case] = []
    for notation in notations:
        match = _NOTATION.fullmatch(notation)
        try:
            size_bytes = parse_bytes(match[2]) if match else 0
        except ValueError:
            match = None
        if match is None:
            raise BenchmarkError(f"{notation!r} is neither a size nor a count and a size; write '64KiB' or '256x1MiB'")
        for count in [int(match[1])] if match[1] else counts:
            cases.append(sized_case(count, size_bytes, piece_bytes))
    return cases


def spec_case(source: str, prompt_tokens: int) -> Case:
    """The prompt of a named model, or of the spec in a file that `kvstore spec` made.

    Raises:
        BenchmarkError: no such name or file, or a length that is not of whole blocks. SpecError: the file is none.
    """
    path = Path(source)
    if source in SHAPES or not path.is_file():
        spec, name = shape(source), source
    else:
        spec, name = load_spec(path), path.name.partition(".")[0]
    check_prompt(spec, prompt_tokens)
    return Case(f"{name}, {prompt_tokens} tokens", spec, prompt_tokens)


def check_prompt(spec: ModelSpec, tokens: int) -> None:
    """Whether a prompt of a spec can be measured; before anything is counted out, since a peer may name any number.

    Raises:
        BenchmarkError: it is not of whole blocks, too long, or has more records than one transfer.
    """
    if not isinstance(tokens, int) or not 0 < tokens < PROMPT_TOKENS_MAX or tokens % spec.block_tokens:
        raise BenchmarkError(
            f"a prompt of {tokens} tokens is not of whole blocks of {spec.block_tokens}, fewer than "
            f"{PROMPT_TOKENS_MAX} in all; choose a multiple"
        )
    records = sum(
        len(spans) * (tokens // spec.block_tokens if group.rule is ReuseRule.ATTENTION else 1)
        for group, spans in zip(spec.groups, spec.spans, strict=True)
    )
    if records > OFFER_RECORDS_MAX:
        raise BenchmarkError(
            f"{tokens} tokens of this model are {records} records, one transfer has at most {OFFER_RECORDS_MAX}; take "
            "a shorter prompt"
        )
