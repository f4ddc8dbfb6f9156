"""What the demo does, step by step, and what must hold. The work happens in the two child processes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvstore.units import format_bytes

from .arguments import PACE_FRACTION
from .child import DemoError
from .compare import compare
from .report import Run, result_table
from .timeline import Panel, draw_timeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

    from .arguments import Options
    from .display import Display
    from .supervise import Child, Supervisor
    from .values import Prompt, Ready, Resumed, Sent, Uncached

DEADLINE_S = 1800.0
"""For any one request to a child; the waits inside have tighter deadlines of their own."""
STORE_AND_FORWARD_SALT = b"store-and-forward"
"""The control runs the first prompt again; under a salt of its own nothing of the first run serves it."""


class Scenario:
    """One run of the demo. Starts both children; the supervisor ends them."""

    def __init__(self, options: Options, display: Display, supervisor: Supervisor) -> None:
        self._options = options
        self._display = display
        self._supervisor = supervisor
        self._began_s = time.monotonic()
        self._prefill: Child = supervisor.start("prefill", _serve_prefill)
        self._decode: Child = supervisor.start("decode", _serve_decode)
        self._address = ""
        self._pace_bytes_per_s = 0.0
        self._layers: dict[int, str] = {}

    def run(self) -> None:
        """All steps.

        Raises:
            DemoError: something that must hold does not, or a process failed.
        """
        display = self._display
        display.heading("Two processes, each with the model and a store of its own")
        prompts = self._start()

        display.heading("The reference: each prompt in one process, without the library")
        references = [self._reference(prompt) for prompt in prompts]
        self._choose_pace(prompts, references)

        display.heading("Prefill in one process, decode in the other; the cache leaves while it is computed")
        first, resumed = self._hand_over(prompts[0], references[0], is_first=True)
        self._check_damaged(references[0], resumed)

        display.heading("The control: the same again, but nothing leaves before the prefill has ended")
        forwarded, received = self._store_and_forward(prompts[0], references[0])
        runs = [replace(first, forwarded=forwarded)]

        display.heading("Two more prompts, which share a prefix with the first")
        runs += [self._hand_over(*pair, is_first=False)[0] for pair in zip(prompts[1:], references[1:], strict=True)]

        picture = self._draw(runs[0], resumed, received)
        self._conclude(runs, picture)

    # Steps

    def _start(self) -> tuple[Prompt, ...]:
        ready: list[Ready] = self._supervisor.gather(
            [(self._prefill, "ready", ()), (self._decode, "ready", ())], deadline_s=DEADLINE_S
        )
        ours, theirs = ready
        if ours.fingerprint != theirs.fingerprint:
            raise DemoError(
                f"the processes built different models: fingerprints {ours.fingerprint[:16]} and "
                f"{theirs.fingerprint[:16]}; the seed does not decide the weights on this machine"
            )
        options = self._options
        kind = "trained weights" if options.is_trained else f"random weights, seed {options.seed}"
        self._display.line(f"{options.model}, {ours.parameters / 1e6:.1f} million parameters, float32, {kind}")
        self._display.line(f"fingerprint {ours.fingerprint[:16]}... in both; decode listens at {theirs.address}")
        for group in ours.groups:
            self._display.line(group)
        self._address, self._layers = theirs.address, ours.layers
        prompts: tuple[Prompt, ...] = self._call(self._prefill, "prompts")
        return prompts

    def _reference(self, prompt: Prompt) -> Uncached:
        uncached: Uncached = self._call(self._prefill, "uncached", prompt)
        self._display.line(f"{prompt.name}: {len(prompt):,} tokens, first token after {uncached.prefill_s:.2f} s")
        return uncached

    def _choose_pace(self, prompts: Sequence[Prompt], references: Sequence[Uncached]) -> None:
        """Slow the link down until the first prompt's transfer takes a good part of its prefill."""
        size_bytes: int = self._call(self._prefill, "transfer_bytes", prompts[0])
        # Other work on the machine makes single runs slow; the fastest rate is the most telling.
        token_s = min(run.prefill_s / len(prompt) for prompt, run in zip(prompts, references, strict=True))
        prefill_s = token_s * len(prompts[0])
        self._pace_bytes_per_s = self._options.pace_bytes_per_s or size_bytes / (PACE_FRACTION * prefill_s)
        seconds = size_bytes / self._pace_bytes_per_s
        self._display.line(
            f"the link is paced to {format_bytes(self._pace_bytes_per_s)}/s: the first prompt's "
            f"{format_bytes(size_bytes)} take {seconds:.2f} s, {seconds / prefill_s:.0%} of its prefill"
        )

    def _hand_over(self, prompt: Prompt, reference: Uncached, *, is_first: bool) -> tuple[Run, Resumed]:
        sent, resumed = self._supervisor.gather(
            [
                (self._prefill, "hand_over", (prompt, self._address, self._pace_bytes_per_s, is_first)),
                (self._decode, "resume", (prompt, b"", is_first)),
            ],
            deadline_s=DEADLINE_S,
        )
        run = self._checked(prompt, reference, sent, resumed)
        if prompt.question is not None and resumed.text is not None:
            self._display.quote("question", prompt.question)
            self._display.quote("answer", resumed.text)
        return run, resumed

    def _store_and_forward(self, prompt: Prompt, reference: Uncached) -> tuple[Sent, Resumed]:
        salt = STORE_AND_FORWARD_SALT
        sent, resumed = self._supervisor.gather(
            [
                (self._prefill, "store_and_forward", (prompt, salt, self._address, self._pace_bytes_per_s)),
                (self._decode, "resume", (prompt, salt, False)),
            ],
            deadline_s=DEADLINE_S,
        )
        self._checked(prompt, reference, sent, resumed)
        return sent, resumed

    def _checked(self, prompt: Prompt, reference: Uncached, sent: Sent, resumed: Resumed) -> Run:
        """Print what happened, and insist that nothing of it shows in the result."""
        comparison = compare(reference.decoded, resumed.decoded)
        matched = sent.matched
        had = f"resumed at {matched.tokens:,}" if matched.tokens else "nothing of it was there"
        self._display.line(
            f"{prompt.name}: {had}, prefill {sent.prefill_s:.2f} s, {format_bytes(sent.sent_bytes)} crossed, "
            f"committed {sent.exposed_s * 1e3:.0f} ms after the prefill"
        )
        self._display.line(
            f"  decode restored {resumed.resumed_tokens:,} tokens in {resumed.restore_s * 1e3:.0f} ms: {comparison}"
        )
        if not comparison.is_exact:
            raise DemoError(
                f"what the decode process made of the {prompt.name!r} prompt is not what one process alone makes of "
                f"it: {comparison}"
            )
        return Run(prompt, reference, sent, comparison)

    def _check_damaged(self, reference: Uncached, resumed: Resumed) -> None:
        damaged = resumed.damaged
        assert damaged is not None, "it was asked for"
        comparison = compare(reference.decoded, damaged.decoded)
        self._display.line(f"  from a damaged copy ({damaged.what}): {comparison}")
        if comparison.is_exact:
            raise DemoError(
                f"a damaged copy ({damaged.what}) gave the same output, so this comparison proves nothing; "
                "use another --seed or more --decode-tokens"
            )
        self._display.line("  so the comparison can fail, and the copy above was intact")

    def _draw(self, first: Run, resumed: Resumed, received: Resumed) -> Path:
        options = self._options
        assert first.forwarded is not None, "the control was run for the first prompt"
        path = options.output / f"timeline-{options.model}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"{options.model}: {len(first.prompt):,} tokens in chunks of {options.chunk_tokens}"
        panels = [
            Panel("streamed while the model computes", first.sent, resumed.bars),
            Panel("store and forward: sent after the prefill", first.forwarded, received.bars),
        ]
        path.write_text(draw_timeline(title, self._layers, panels), encoding="utf-8")
        return path

    def _conclude(self, runs: list[Run], picture: Path) -> None:
        console = self._display.console
        console.print()
        console.print(result_table(runs))
        console.print("Why nothing deeper served:")
        for run in runs:
            self._display.line(f"{run.prompt.name}: {'; '.join(run.sent.matched.reasons[:2])}")
        first, forwarded = runs[0], runs[0].forwarded
        assert forwarded is not None, "the control was run for the first prompt"
        alone_s = forwarded.exposed_s
        console.print(
            f"\nThe transfer alone took {alone_s:.2f} s, {alone_s / first.sent.prefill_s:.0%} of the prefill; "
            f"streamed, {first.sent.exposed_s / alone_s:.0%} of that was left after it."
        )
        console.print(f"Timeline: {picture}", soft_wrap=True)
        console.print(f"All compared logits are bit for bit equal. {time.monotonic() - self._began_s:.0f} s in all.")

    def _call(self, child: Child, method: str, *arguments: Any) -> Any:
        return self._supervisor.call(child, method, *arguments, deadline_s=DEADLINE_S)


def _serve_prefill(connection: Connection, options: Options) -> None:
    # Imported in the child: this module brings torch, which the parent has no use for.
    from .prefill_process import serve_prefill

    serve_prefill(connection, options)


def _serve_decode(connection: Connection, options: Options) -> None:
    from .decode_process import serve_decode

    serve_decode(connection, options)
