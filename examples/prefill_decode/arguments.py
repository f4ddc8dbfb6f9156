"""The demo's command line."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from kvstore.limits import BLOCK_TOKENS_MAX
from kvstore.units import format_bytes, parse_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
RANDOM_FAMILIES = ("qwen3_5", "falcon_h1", "bamba")
TRAINED_FAMILIES = ("smollm2",)
PACE_FRACTION = 0.65
"""By default the transfer alone takes this share of the prefill."""
CHUNKS_MIN = 4
"""With fewer chunks there is no room for two checkpoints and prompts that part ways after each."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        model: family.
        size: `demo` or `tiny`; a trained model has one size.
        prompt_tokens: length of the first prompt.
        block_tokens: tokens of an attention block.
        chunk_tokens: tokens of a prefill chunk.
        decode_tokens: tokens to decode.
        pace_bytes_per_s: rate of the link; None to choose it from the measured prefill.
        text: a text for a trained model to read.
        seed: of the weights and the prompts.
        output: folder for the timeline.
        sabotage: compare the damaged copy, to see the command fail.
    """

    model: str
    size: str
    prompt_tokens: int
    block_tokens: int
    chunk_tokens: int
    decode_tokens: int
    pace_bytes_per_s: float | None
    text: Path
    seed: int
    output: Path
    sabotage: bool

    @property
    def is_trained(self) -> bool:
        return self.model in TRAINED_FAMILIES


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """Options from the command line; exits with a message and status 2 on impossible ones."""
    parser = _parser()
    given = parser.parse_args(arguments)
    is_trained = given.model in TRAINED_FAMILIES
    is_tiny = given.size == "tiny"
    if is_trained and is_tiny:
        parser.error(f"--size tiny is for random weights; {given.model} has one size")
    prompt_tokens = given.prompt_tokens or (1200 if is_trained else 330 if is_tiny else 4000)
    block_tokens = given.block_tokens or (16 if is_tiny else 64)
    chunk_tokens = given.chunk_tokens or (64 if is_tiny else 256 if is_trained else 512)
    if block_tokens > BLOCK_TOKENS_MAX:
        parser.error(f"--block-tokens {block_tokens} is above the limit of {BLOCK_TOKENS_MAX}")
    if chunk_tokens % block_tokens:
        parser.error(
            f"--chunk-tokens {chunk_tokens} is no multiple of --block-tokens {block_tokens}: states are stored where "
            "a chunk and a block end together"
        )
    if prompt_tokens <= CHUNKS_MIN * chunk_tokens:
        parser.error(
            f"--prompt-tokens {prompt_tokens} is at most {CHUNKS_MIN} chunks of {chunk_tokens}; give more, "
            "or a smaller --chunk-tokens"
        )
    if given.decode_tokens < 2:
        parser.error("--decode-tokens must be at least 2: the first token comes with the hand-over")
    if not given.text.is_file():
        parser.error(f"--text {given.text}: there is no such file")
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {given.output}: the folder cannot be made: {error.strerror}; name another")
    if not os.access(given.output, os.W_OK):
        parser.error(f"--output {given.output}: the folder is not writable; name another")
    return Options(
        model=given.model,
        size=given.size,
        prompt_tokens=prompt_tokens,
        block_tokens=block_tokens,
        chunk_tokens=chunk_tokens,
        decode_tokens=given.decode_tokens,
        pace_bytes_per_s=given.pace,
        text=given.text,
        seed=given.seed,
        output=given.output,
        sabotage=given.sabotage,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="01_prefill_decode.py",
        description="One process prefills a prompt of a hybrid model and streams its cache, layer by layer, over "
        "loopback TCP to a second process, which decodes it. Both are compared with a run without a cache: token for "
        "token, and bit for bit on the logits. Exit status: 0 equal, 1 not equal or failed, 2 wrong arguments, "
        "130 interrupted.",
    )
    add = parser.add_argument
    add(
        "--model",
        choices=(*RANDOM_FAMILIES, *TRAINED_FAMILIES),
        default="qwen3_5",
        help="qwen3_5: gated delta nets and attention; falcon_h1: both in each layer; bamba: Mamba-2 and attention; "
        "these three with random weights. smollm2: trained weights, attention only (default: %(default)s)",
    )
    add("--size", choices=("demo", "tiny"), default="demo", help="of a random model; tiny runs in seconds")
    add("--prompt-tokens", type=_count, metavar="N", help="length of the first prompt (default: 4000, smollm2 1200)")
    add("--block-tokens", type=_count, metavar="N", help="tokens of an attention block, 1 to 256 (default: 64)")
    add("--chunk-tokens", type=_count, metavar="N", help="tokens of a prefill chunk (default: 512, smollm2 256)")
    add("--decode-tokens", type=_count, metavar="N", default=64, help="tokens to decode (default: %(default)s)")
    add(
        "--pace",
        type=_rate,
        metavar="RATE",
        help="bytes per second of the link, such as 4MB (default: measured, so that the transfer alone takes "
        f"{PACE_FRACTION:.0%}% of the prefill)",
    )
    add(
        "--text",
        type=Path,
        metavar="FILE",
        default=REPOSITORY / "LICENSE",
        help="with smollm2: the text that the questions are about (default: the project's licence)",
    )
    add("--seed", type=_seed, metavar="N", default=0, help="of the weights and of the prompts (default: %(default)s)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        default=REPOSITORY / "build" / "demo",
        help="folder for the timeline picture (default: build/demo)",
    )
    add("--sabotage", action="store_true", help="compare the damaged copy, to see that a mismatch fails the command")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: give a whole number from 0 to 2^32 - 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = parse_bytes(text.removesuffix("/s"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if rate < 64 << 10:
        raise argparse.ArgumentTypeError(
            f"{format_bytes(rate)}/s is below the 64 KiB/s that this demo makes sense with"
        )
    return float(rate)
