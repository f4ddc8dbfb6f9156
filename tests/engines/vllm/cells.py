"""The matrix for vLLM: which engines are started, what each is asked, and how the answers are judged."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.environment import ROOT, NotRunError
from tests.engines.matrix import Answer, Cell, Verdict, distance, holds, judge, not_run
from tests.engines.vllm import rank_cells, soak, tier_cells
from tests.engines.vllm.engine import VARIABLES, Engine, EngineError, Ran, Request, ends_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.engines.environment import Environment

ENGINE = "vllm"
DISK_BYTES = 5 << 30
SCRIPT_OF_MODELS = Path(__file__).parent / "models.py"
SCRIPT_OF_SPECS = Path(__file__).parent / "specs.py"
CHUNK_TOKENS = 256
PREFIX_TOKENS = 2 * CHUNK_TOKENS
SUFFIX_TOKENS = 40
HANDOVER_TOKENS = 600
DECODED = 8
PREEMPTED_TOKENS = 400
PREEMPTED_AFTER = (10, 40)
"""Tokens that were decoded when the engine takes the pages of a request."""
TURN_TOKENS = 300
TURN_DECODED = 220
TIGHT_OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": 2 << 20, "max_model_len": 640}
"""8 pages of 128 tokens of the dense model: not enough for three prompts of `TURN_TOKENS` that decode."""
EXAMPLE_LIMIT_S = 300.0
EXAMPLES = {
    "11_vllm_prefix_cache.py": ("question 1: 0 of 536", "question 2: 512 of 536"),
    "12_vllm_prefill_decode.py": ("computed 600 tokens", "took over 600 tokens", "is what one instance says alone"),
}


@dataclass(frozen=True)
class Model:
    """A model of the matrix.

    Attributes:
        faults: the controls that must show: a state or window that is zeroed, a block of attention that is.
    """

    name: str
    dtype: str
    faults: tuple[str, ...]


MODELS = (
    Model("dense", "float32", ("zero_block", "other_block")),
    Model("window", "float32", ("zero_states", "zero_block")),
    Model("hybrid", "bfloat16", ("zero_states", "zero_block")),
    Model("hybrid over ranks", "bfloat16", ("zero_states",)),
)

CASES = {
    "plain": ("no store, twice", "engine's own cache"),
    "store": (
        "cold",
        "warm",
        "longer prompt",
        "own cache after a load",
        "two tenants",
        "eviction after match",
        "expiry after match",
        "abort",
        "preemption",
    ),
    "restart": ("restarted, warm disk", "corrupted record"),
    "handover": ("prefill to decode", "node killed"),
    "layers": ("layer by layer", "by layer, the same bytes"),
    "failed layer": ("layer that cannot be loaded",),
    "killed": ("node killed on the way",),
    "turns": ("preemption, decoded tokens", "next turn"),
    "tight": ("too few pages",),
    **tier_cells.CASES,
    "soak": soak.CASES,
    "ranks": rank_cells.CASES,
    "specs": ("specs and kernels",),
    "examples": ("11_vllm_prefix_cache.py", "12_vllm_prefill_decode.py"),
}
OTHERS = ("plain", "store", "restart", "handover", "killed", "turns", "layers", "tier", "tier restart", "soak")
ALL = {
    "dense": tuple(CASES),  # two key heads, so ranks as well
    "window": OTHERS,
    "hybrid": OTHERS,
    "hybrid over ranks": ("ranks",),
}
QUICK = {
    "dense": ("plain", "store", "restart", "specs", "examples"),
    "window": ("plain", "store"),
    "hybrid": ("plain", "store", "restart", "handover", "tier", "tier restart"),
    "hybrid over ranks": (),
}


def options_of(model: Model) -> dict[str, Any]:
    """How an engine is made: small, and with steps that end where a test can say it."""
    return {
        "skip_tokenizer_init": True, "dtype": model.dtype, "max_model_len": 1024, "max_num_seqs": 4,
        "max_num_batched_tokens": CHUNK_TOKENS, "enforce_eager": True, "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 64 << 20, "seed": 0,
    }  # fmt: skip


def connector_of(extra: dict[str, Any]) -> dict[str, Any]:
    """A `--kv-transfer-config` with kvstore."""
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.adapters.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def expected(is_quick: bool, models: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Models and cases of the matrix, or of its quick slice."""
    return [
        (model.name, case)
        for model in MODELS
        if models is None or model.name in models
        for part in (QUICK if is_quick else ALL)[model.name]
        for case in CASES[part]
    ]


def cells(
    environment: Environment, folder: Path, *, is_quick: bool, models: Sequence[str] | None, seed: int
) -> Iterator[Cell]:
    """All cells, one after the other; where an engine fails, the cells that it would have filled are broken."""
    slice_of = QUICK if is_quick else ALL
    chosen = [model for model in MODELS if slice_of[model.name] and (models is None or model.name in models)]
    try:
        names = [model.name for model in chosen]
        environment.run(SCRIPT_OF_MODELS, [str(folder / "models"), *names], log=folder / "models.log", limit_s=300)
    except NotRunError as error:
        for model_name, case in expected(is_quick, models):
            yield not_run(ENGINE, model_name, case, str(error))
        return
    for model in chosen:
        with Matrix(environment, folder, model, seed, slice_of[model.name]) as matrix:
            yield from matrix.run()


class Matrix:
    """The cells of one model. Engines start when they are made, so that two start at once."""

    def __init__(self, environment: Environment, folder: Path, model: Model, seed: int, parts: Sequence[str]) -> None:
        self.model = model
        self._environment = environment
        self._folder = folder / model.name
        self._folder.mkdir(parents=True)
        self._model_folder = folder / "models" / model.name
        self._seed = seed
        self._parts = parts
        self._engines = ExitStack()
        self._references: dict[tuple[str, Request], tuple[Answer, ...]] = {}
        self._plain: Engine

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        self._engines.close()

    def run(self) -> Iterator[Cell]:
        self._plain = self._start("plain")
        if "store" in self._parts:
            yield from self._store_parts()
        if "layers" in self._parts:
            yield from self._layer_parts()
        if "tier" in self._parts:
            yield from self._tier_parts()
        if "soak" in self._parts:
            yield from self._cells("soak", self._soak_cells)
        if "ranks" in self._parts:
            yield from self._rank_part()
        if "specs" in self._parts:
            yield from self._cells("specs", self._spec_cells)
        if "examples" in self._parts:
            yield from self._cells("examples", self._example_cells)

    def _store_parts(self) -> Iterator[Cell]:
        store = self._start("store", self._settings("store", ssd=True, listens=True))
        yield from self._cells("plain", lambda: self._plain_cells())
        yield from self._cells("store", lambda: self._store_cells(store))
        written, failure = {}, ""
        try:
            written = self._write(store) if "restart" in self._parts else {}
        except (EngineError, NotRunError) as error:  # then the cells about it say so
            failure = str(error)
        if "handover" in self._parts:
            decode = self._start("decode", self._settings("decode"))
            yield from self._cells("handover", lambda: self._handover_cells(store, decode))  # kills one of them
        if "restart" in self._parts:
            store.quit()
            again = self._start("restarted", self._settings("store", ssd=True, listens=True))
            yield from self._cells("restart", lambda: self._restart_cells(again, written, failure))
            if "killed" in self._parts:
                yield from self._cells("killed", lambda: self._killed_cells(again, decode))
            again.quit()
        if "handover" in self._parts:
            decode.quit()
        store.quit()
        if "turns" in self._parts:
            turns = self._start("turns", self._settings("turns", saves_decoded=True))
            yield from self._cells("turns", lambda: self._turn_cells(turns))
            turns.quit()
        if "tight" in self._parts:
            tight = self._start("tight", self._settings("tight"), **TIGHT_OPTIONS)
            yield from self._cells("tight", lambda: self._tight_cells(tight))
            tight.quit()

    def _rank_part(self) -> Iterator[Cell]:
        tools = rank_cells.Tools(self._environment, self._start, connector_of, self._pair, self._reference)
        ranks = rank_cells.RankCells(
            tools, self.model.name, self.model.faults, self._folder, f"{self.model.name} {self._seed}"
        )
        self._engines.enter_context(ranks.node)
        yield from self._cells("ranks", ranks.cells)

    def _layer_parts(self) -> Iterator[Cell]:
        settings = self._settings("layers")
        options: dict[str, Any] = {}
        settings["kv_connector_extra_config"]["saves_by_layer"] = True
        if "failed layer" in self._parts:
            settings["kv_connector_extra_config"]["load"] = "layered"
            options["async_scheduling"] = False
        engine = self._start("layers", settings, **options)
        yield from self._cells("layers", lambda: self._layer_cells(engine))
        if "failed layer" in self._parts:
            yield from self._cells("failed layer", lambda: self._failed_layer_cells(engine))
        engine.quit()

    def _tier_parts(self) -> Iterator[Cell]:
        tools = tier_cells.Tools(self._start, self._pair, self._reference, self._compared)
        tier = tier_cells.TierCells(tools, self.model.name, self._folder, f"{self.model.name} {self._seed}")
        engine = self._start("tier", tier_cells.offloading_of(tier.own()))
        yield from self._cells("tier", lambda: tier.cells(engine))
        if "tier restart" in self._parts:
            yield from self._cells("tier restart", lambda: tier.restart_cells(engine, _flip_bytes))
        engine.quit()
        if "tier attached" in self._parts:
            yield from self._cells("tier attached", tier.attached_cells)

    def _cells(self, part: str, make: Callable[[], Iterator[Cell]]) -> Iterator[Cell]:
        """Cells of one part; what is missing when it fails is broken, and says why once."""
        missing = list(CASES[part])
        verdict, reason = Verdict.BROKEN, "it was left out"
        try:
            self._plain.wait_until_ready()
        except NotRunError as error:
            verdict, reason = Verdict.NOT_RUN, str(error)
        else:
            try:
                for cell in make():
                    missing.remove(cell.case)
                    yield cell
            except (EngineError, NotRunError) as error:  # the engine runs by itself, so it should with kvstore
                reason = str(error)
        for case in missing:
            yield Cell(ENGINE, self.model.name, case, verdict, reason=reason)
            reason = "as the one before"

    # Engines

    def _start(
        self, name: str, connector: dict[str, Any] | None = None, *, variables: dict[str, str] | None = None,
        **more: Any,
    ) -> Engine:  # fmt: skip
        engine = Engine(
            self._environment,
            name,
            self._folder,
            model=self._model_folder,
            options=options_of(self.model) | more,
            connector=connector,
            variables=variables,
        )
        return self._engines.enter_context(engine)

    def _settings(
        self, name: str, *, ssd: bool = False, listens: bool = False, saves_decoded: bool = False
    ) -> dict[str, Any]:
        extra: dict[str, Any] = {"weights": f"{self.model.name} {self._seed}", "dram": "48MiB", "fetch_deadline_s": 10}
        extra["saves_decoded"] = saves_decoded
        extra["peers"] = ["tcp://127.0.0.1:*"]
        if ssd:
            extra["ssd"] = [f"{self._folder / name}-ssd:256MiB"]
        if listens:
            extra["listen"] = ["tcp://127.0.0.1:0"]
        return connector_of(extra)

    # Prompts and references

    def _prompt(self, case: str, tokens: int) -> tuple[int, ...]:
        """Token ids of a case; each case has its own, so that none finds another's."""
        numbers = random.Random(f"{self._seed} {self.model.name} {case}")
        return tuple(numbers.randrange(3, 500) for _ in range(tokens))

    def _pair(self, case: str, prefix_tokens: int = PREFIX_TOKENS) -> tuple[Request, Request]:
        ids = self._prompt(case, prefix_tokens + SUFFIX_TOKENS)
        return Request(ids[:prefix_tokens], 1), Request(ids, DECODED)

    def _reference(self, request: Request, ends: Sequence[int], plain: Engine | None = None) -> tuple[Answer, ...]:
        """What the engine without kvstore says, or another one that is without, in steps that end where those did."""
        plain = plain or self._plain
        prompt_tokens = len(request.ids)
        wanted = Request(request.ids, request.max_tokens, boundaries=tuple(end for end in ends if end <= prompt_tokens))
        if (plain.name, wanted) not in self._references:
            ran = plain.generate(wanted)
            cut = tuple(end for end in ends_of(ran.steps[0]) if end <= prompt_tokens)
            if cut != tuple(sorted(set(wanted.boundaries))):
                raise EngineError(f"the engine steps to {cut}, and the reference needs {wanted.boundaries}")
            self._references[plain.name, wanted] = ran.answers
        return self._references[plain.name, wanted]

    # No store

    def _plain_cells(self) -> Iterator[Cell]:
        plain, name = self._plain, self.model.name
        prefix, full = self._pair("plain")
        first, second = plain.generate(full), plain.generate(full)
        yield judge(ENGINE, name, "no store, twice", reference=first.answers, answers=second.answers)
        plain.generate(prefix)
        hit = plain.generate(full, forgets=False)
        cached = hit.cached_tokens[0]
        reference = self._reference(full, (*_upto(first, cached), *ends_of(hit.steps[0])))
        broken = [] if cached else ["its own cache did not hit"]
        yield judge(
            ENGINE,
            name,
            "engine's own cache",
            reference=reference,
            answers=hit.answers,
            broken=broken,
            figures={"cached": cached, "cold differs by": distance(first.answers, hit.answers)},
        )

    # One engine with kvstore

    def _warm(
        self, engine: Engine, prefix: Request, full: Request, *, fault: str = "", hook: dict[str, Any] | None = None
    ) -> tuple[float, Ran, tuple[Answer, ...]]:
        """Compute a prefix, then the prompt: the distance to the reference, what ran, and the reference."""
        cold = engine.generate(prefix)
        ran = engine.generate(full, fault=fault, hook=hook)
        return self._compared(full, cold, ran, fault)

    def _compared(self, full: Request, cold: Ran, ran: Ran, fault: str = "") -> tuple[float, Ran, tuple[Answer, ...]]:
        ends = (*_upto(cold, ran.cached_tokens[0]), *ends_of(ran.steps[0]))
        reference = self._reference(full, ends)
        if fault and not ran.faults:
            return 0.0, ran, reference  # a control that did nothing is not caught
        return distance(reference, ran.answers), ran, reference

    def _control(self, engine: Engine, case: str, *, prefix_tokens: int = PREFIX_TOKENS) -> float:
        """The least that any of the model's faults changes."""
        least = float("inf")
        for fault in self.model.faults:
            prefix, full = self._pair(f"{case}, {fault}", prefix_tokens)
            least = min(least, self._warm(engine, prefix, full, fault=fault)[0])
        return least

    def _store_cells(self, engine: Engine) -> Iterator[Cell]:
        name = self.model.name
        prefix, full = self._pair("warm")
        cold = engine.generate(prefix)
        broken = ["something was cached"] if cold.cached_tokens[0] else []
        yield judge(
            ENGINE, name, "cold", reference=self._reference(prefix, ends_of(cold.steps[0])), answers=cold.answers,
            broken=broken,
        )  # fmt: skip
        ran = engine.generate(full)
        _, ran, reference = self._compared(full, cold, ran)
        yield self._judged("warm", ran, reference, PREFIX_TOKENS, self._control(engine, "warm"))

        prefix, full = self._pair("longer", HANDOVER_TOKENS)  # a resume point in the middle of pages and blocks
        _, ran, reference = self._warm(engine, prefix, full)
        control = self._control(engine, "longer", prefix_tokens=HANDOVER_TOKENS)
        yield self._judged("longer prompt", ran, reference, HANDOVER_TOKENS, control)

        yield self._after_load(engine)
        yield self._tenants(engine)

        # What is matched is held: others go, and it is loaded. What its owner ends is not there any more.
        for case, hook, least in (("eviction", "evict", PREFIX_TOKENS), ("expiry", "expire", 0)):
            prefix, full = self._pair(case)
            _, ran, reference = self._warm(engine, prefix, full, hook={"kind": hook})
            broken = [] if ran.hooks else ["nothing happened between match and load"]
            control = self._control(engine, case)
            yield self._judged(f"{case} after match", ran, reference, least, control, broken)

        prefix, full = self._pair("abort")
        engine.generate(prefix)
        broken = []
        for after in (0, 2):  # while it is loaded, and while it decodes
            aborted = engine.generate(Request(full.ids, 64, abort_after=after))
            if not after <= len(aborted.answers[0].tokens) <= after + 2:
                broken.append(f"it was not aborted after {after} tokens but {len(aborted.answers[0].tokens)}")
            broken += [f"left: {leak}" for leak in engine.leaks()]
        yield holds(ENGINE, name, "abort", broken)
        yield self._preempted(engine, "preemption", Request(self._prompt("preempted", PREEMPTED_TOKENS), 60))

    def _after_load(self, engine: Engine) -> Cell:
        """The engine's own cache holds what was loaded: a prompt that leaves the loaded one a little earlier finds it.

        What is loaded ends some tokens behind a page, so a window of it begins within a page.
        """
        ids = self._prompt("after a load", PREFIX_TOKENS + 2 * SUFFIX_TOKENS)
        prefix, loading = Request(ids[: PREFIX_TOKENS + 10], 1), Request(ids[: PREFIX_TOKENS + SUFFIX_TOKENS], DECODED)
        other = Request((*ids[:PREFIX_TOKENS], *ids[-SUFFIX_TOKENS:]), DECODED)
        cold = engine.generate(prefix)
        loaded = engine.generate(loading)
        broken = [] if loaded.cached_tokens[0] == len(prefix.ids) else [f"{loaded.cached_tokens[0]} tokens were loaded"]
        ran = engine.generate(other, forgets=False)
        _, _, reference = self._compared(other, cold, ran)
        control = self._control(engine, "after a load")
        return self._judged("own cache after a load", ran, reference, PREFIX_TOKENS, control, broken)

    def _tenants(self, engine: Engine) -> Cell:
        """What one tenant has stored is not found by another, and is by itself."""
        prefix, full = self._pair("tenants")
        cold = engine.generate(Request(prefix.ids, 1, salt="tenant one"))
        other = engine.generate(Request(full.ids, DECODED, salt="tenant two"))
        same = engine.generate(Request(full.ids, DECODED, salt="tenant one"))
        broken = [] if other.cached_tokens[0] == 0 else [f"tenant two found {other.cached_tokens[0]} tokens"]
        broken += [] if same.cached_tokens[0] else ["tenant one found nothing"]
        _, _, reference = self._compared(full, cold, same)
        answers = (*other.answers, *same.answers)
        references = (*self._reference(full, ends_of(other.steps[0])), *reference)
        return judge(
            ENGINE, self.model.name, "two tenants", reference=references, answers=answers,
            broken=[*broken, *self._one_tenant(engine)], control=self._wrong_tenant(engine),
        )  # fmt: skip

    def _one_tenant(self, engine: Engine) -> list[str]:
        """What is broken if salts are ignored: nothing unless the second tenant finds what the first has stored."""
        prefix, full = self._pair("one tenant")
        engine.generate(Request(prefix.ids, 1, salt="tenant one"), fault="same_tenant")
        found = engine.generate(Request(full.ids, DECODED, salt="tenant two"), fault="same_tenant")
        return [] if found.cached_tokens[0] else ["without salts tenant two does not find what tenant one has stored"]

    def _wrong_tenant(self, engine: Engine) -> float:
        """What a block of another tenant's prompt changes, loaded as the tenant's own."""
        prefix, full = self._pair("wrong tenant, two")
        engine.generate(Request(prefix.ids, 1, salt="tenant two"))
        noted = engine.generate(Request(full.ids, 1, salt="tenant two"), fault="note_block")
        prefix, full = self._pair("wrong tenant, one")
        cold = engine.generate(Request(prefix.ids, 1, salt="tenant one"))
        ran = engine.generate(Request(full.ids, DECODED, salt="tenant one"), fault="noted_block")
        return self._compared(full, cold, ran, "noted_block")[0] if noted.faults else 0.0

    def _judged(
        self, case: str, ran: Ran, reference: tuple[Answer, ...], least_cached: int, control: float,
        broken: Sequence[str] = (),
    ) -> Cell:  # fmt: skip
        cached = ran.cached_tokens[0]
        missed = [f"{cached} tokens cached instead of {least_cached}"] if cached < least_cached else []
        return judge(
            ENGINE, self.model.name, case, reference=reference, answers=ran.answers, control=control,
            broken=[*broken, *missed], figures={"cached": cached},
        )  # fmt: skip

    # Layer by layer

    def _layer_cells(self, engine: Engine) -> Iterator[Cell]:
        prefix, full = self._pair("layers")
        _, ran, reference = self._warm(engine, prefix, full)
        broken = [f"left: {leak}" for leak in engine.leaks()]
        yield self._judged("layer by layer", ran, reference, PREFIX_TOKENS, self._control(engine, "layers"), broken)

        ids = self._prompt("same bytes", HANDOVER_TOKENS)
        found = []
        for is_on in (True, False):
            engine.ask("layers", is_on=is_on)
            engine.generate(Request(ids, 1, salt=f"by layer: {is_on}"))
            found.append(engine.ask("digests", ids=ids, salt=f"by layer: {is_on}")["digests"])
        engine.ask("layers", is_on=True)
        broken = [] if any(found[0]) else ["nothing is stored"]
        broken += [] if found[0] == found[1] else [f"other bytes: {found[0]} and {found[1]}"]
        yield holds(ENGINE, self.model.name, "by layer, the same bytes", broken)

    def _failed_layer_cells(self, engine: Engine) -> Iterator[Cell]:
        """The last layer's load fails when the others have been computed with: all of it is computed again."""
        prefix, full = self._pair("failed layer")
        engine.generate(prefix)
        ran = engine.generate(full, fault="fail_layer")
        broken = [] if ran.faults else ["no load failed"]
        broken += [f"left: {leak}" for leak in engine.leaks()]
        broken += [] if ran.steps[0][0][0] == PREFIX_TOKENS else ["nothing was loaded"]
        broken += [] if any(start == 0 for start, _ in ran.steps[0]) else ["nothing was computed again"]
        reference = self._reference(full, sorted(set(ends_of(ran.steps[0]))))
        yield judge(
            ENGINE, self.model.name, "layer that cannot be loaded", reference=reference, answers=ran.answers,
            broken=broken, control=self._control(engine, "failed layer"),
        )  # fmt: skip

    # An engine that comes back, with what lies on disk

    def _write(self, engine: Engine) -> dict[str, tuple[Request, Ran]]:
        """What the engine that comes back is asked, and how the one before computed its prefix, which is on disk."""
        written: dict[str, tuple[Request, Ran]] = {}
        engine.ask("flush", may_lack=True)  # the cells before it evict, on a slow machine before all was on disk
        for case in ("restart", *self.model.faults, "corrupt"):
            prefix, full = self._pair(f"written, {case}")
            written[case] = full, engine.generate(prefix)
        engine.ask("flush")
        return written

    def _restart_cells(self, again: Engine, written: dict[str, tuple[Request, Ran]], failure: str) -> Iterator[Cell]:
        if not written:
            raise EngineError(f"the engine before it failed when it was to store prompts: {failure}")
        name = self.model.name
        control = float("inf")
        for fault in self.model.faults:
            full, cold = written[fault]
            ran = again.generate(full, fault=fault)
            control = min(control, self._compared(full, cold, ran, fault)[0])
        full, cold = written["restart"]
        _, ran, reference = self._compared(full, cold, again.generate(full))
        yield self._judged("restarted, warm disk", ran, reference, PREFIX_TOKENS, control)

        full, cold = written["corrupt"]
        broken = [] if again.ask("stored", ids=full.ids)["tokens"][0] else ["it was not on disk"]
        broken += [] if _flip_bytes(self._folder / "store-ssd") else ["no byte was flipped"]
        before = again.ask("store")["damaged_records"]
        ran = again.generate(full)
        broken += [] if again.ask("store")["damaged_records"] > before else ["no damage was noticed"]
        _, ran, reference = self._compared(full, cold, ran)
        broken += [f"left: {leak}" for leak in again.leaks()]
        yield judge(
            ENGINE, name, "corrupted record", reference=reference, answers=ran.answers, control=control, broken=broken,
            figures={"cached": ran.cached_tokens[0]},
        )  # fmt: skip

    # Two engines

    def _handover_cells(self, prefill: Engine, decode: Engine) -> Iterator[Cell]:
        control = float("inf")
        for fault in self.model.faults:
            control = min(control, self._handed_over(prefill, decode, f"hand-over, {fault}", fault)[0])
        _, ran, reference, broken = self._handed_over(prefill, decode, "hand-over")
        broken += [f"left: {leak}" for leak in (*prefill.leaks(), *decode.leaks())]
        yield self._judged("prefill to decode", ran, reference, HANDOVER_TOKENS, control, broken)

        yield self._killed(prefill, decode, "node killed", prefill.kill, control)

    def _killed_cells(self, prefill: Engine, decode: Engine) -> Iterator[Cell]:
        """The prefill instance dies when part of its bytes have been sent."""
        control = min(
            self._handed_over(prefill, decode, f"on the way, {fault}", fault)[0] for fault in self.model.faults
        )
        prefill.ask("die_sending", frames=2)

        def has_died() -> list[str]:
            return [] if prefill.has_died(30.0) else ["the prefill instance sent everything"]

        yield self._killed(prefill, decode, "node killed on the way", has_died, control, least=0)

    def _killed(
        self, prefill: Engine, decode: Engine, case: str, kill: Callable[[], list[str] | None], control: float,
        least: int | None = None,
    ) -> Cell:  # fmt: skip
        first, ids = self._prefilled(prefill, case)
        decode.forget()
        request = Request((*ids, first.answers[0].tokens[0]), DECODED, params=first.params[0])
        decode.begin(request)
        broken = kill() or []
        ran = decode.finish()
        cached = ran.cached_tokens[0]
        reference = self._reference(Request(request.ids, DECODED), (*_upto(first, cached), *ends_of(ran.steps[0])))
        broken += [f"{cached} tokens came from a part"] if least is not None and cached > least else []
        broken += [f"left: {leak}" for leak in decode.leaks()]
        return judge(
            ENGINE, self.model.name, case, reference=reference, answers=ran.answers, control=control, broken=broken,
            figures={"cached": cached},
        )  # fmt: skip

    def _prefilled(self, prefill: Engine, case: str) -> tuple[Ran, tuple[int, ...]]:
        ids = self._prompt(case, HANDOVER_TOKENS)
        return prefill.generate(Request(ids, 1, params={"do_remote_decode": True})), ids

    def _handed_over(
        self, prefill: Engine, decode: Engine, case: str, fault: str = ""
    ) -> tuple[float, Ran, tuple[Answer, ...], list[str]]:
        """One engine computes the prompt and samples a token, the other goes on: against one that does both."""
        first, ids = self._prefilled(prefill, case)
        broken = [] if first.params[0] else ["the prefill instance returned no kv_transfer_params"]
        request = Request((*ids, first.answers[0].tokens[0]), DECODED, params=first.params[0])
        ran = decode.generate(request, fault=fault)
        (whole,) = self._reference(Request(ids, 1 + DECODED), ends_of(first.steps[0]))
        reference = (Answer(whole.tokens[1:], whole.logprobs[1:]),)
        if fault and not ran.faults:
            return 0.0, ran, reference, broken
        return distance(reference, ran.answers), ran, reference, broken

    # Everything at random

    def _soak_cells(self) -> Iterator[Cell]:
        name = self.model.name
        for case in soak.CASES:
            is_async = case == soak.CASES[0]
            settings = soak.settings_of(
                f"{case} {self._seed}", self._folder / f"soak-ssd-{is_async}", saves_decoded=is_async
            )
            engine = self._start(f"soak-{is_async}", connector_of(settings), **soak.options_of(name, is_async=is_async))
            yield soak.Soak(self._plain, engine, name, str(self._seed)).cell(ENGINE, case, self.model.faults)
            engine.quit()

    # Requests that lose their pages, and turns of a conversation

    def _without_pages(self, engine: Engine, request: Request, after: tuple[int, ...], fault: str = "") -> Ran:
        return engine.generate(Request(request.ids, request.max_tokens, preempt_after=after), fault=fault)

    def _preempted(self, engine: Engine, case: str, request: Request, after: tuple[int, ...] = PREEMPTED_AFTER) -> Cell:
        """A request loses its pages while it decodes, and comes back for what is stored of it.

        The reference loses them, too, and computes again what is loaded here, in the same steps: decoded tokens that
        are computed together with the prompt's differ from themselves.
        """
        control = float("inf")
        for fault in self.model.faults:
            ids = self._prompt(f"{case}, {fault}", len(request.ids))
            other = Request(ids, request.max_tokens)
            ran = self._without_pages(engine, other, after, fault)
            control = min(control, distance(self._again(ran, other, after), ran.answers) if ran.faults else 0.0)
        ran = self._without_pages(engine, request, after)
        reference = self._again(ran, request, after)
        broken = [] if ran.preemptions == len(after) else [f"{ran.preemptions} preemptions instead of {len(after)}"]
        broken += [f"resumed at {each}" for each in _resumed(ran.steps[0]) if each < len(request.ids)]
        broken += [f"left: {leak}" for leak in engine.leaks()]
        return judge(
            ENGINE, self.model.name, case, reference=reference, answers=ran.answers, control=control, broken=broken,
            figures={
                "resumed at": max(_resumed(ran.steps[0]), default=0),
                "never preempted differs by": distance(self._plain.generate(request).answers, reference),
            },
        )  # fmt: skip

    def _again(self, ran: Ran, request: Request, after: tuple[int, ...], number: int = 0) -> tuple[Answer, ...]:
        """What the engine without kvstore says when it loses its pages as often; each time it computes all again."""
        steps, prompt_tokens = ran.steps[number], len(request.ids)
        boundaries = {stop for start, stop in steps if stop <= prompt_tokens}
        boundaries |= set(range(prompt_tokens + 1, max(_resumed(steps), default=0) + 1))  # one by one, as decoded
        plain = self._plain.generate(
            Request(request.ids, request.max_tokens, boundaries=tuple(sorted(boundaries)), preempt_after=after)
        )
        if plain.preemptions != len(after):
            raise EngineError(f"the reference lost its pages {plain.preemptions} times instead of {len(after)}")
        return plain.answers

    def _turn_cells(self, engine: Engine) -> Iterator[Cell]:
        """What is decoded is saved, too: a request comes back for it, and the next turn of a conversation."""
        case, after = "preemption, decoded tokens", (TURN_DECODED, TURN_DECODED + 20)
        request = Request(self._prompt(case, TURN_TOKENS), TURN_DECODED + 30)
        cell = self._preempted(engine, case, request, after)
        lost = "" if cell.figures["resumed at"] > TURN_TOKENS else "nothing decoded was found"
        yield cell if not lost else holds(ENGINE, self.model.name, case, [lost])

        def turns(case: str) -> tuple[Ran, Request]:
            first = Request(self._prompt(case, TURN_TOKENS), TURN_DECODED)
            said = engine.generate(first)
            return said, Request(
                (*first.ids, *said.answers[0].tokens, *self._prompt(f"{case}, then", SUFFIX_TOKENS)), DECODED
            )

        control = float("inf")
        for fault in self.model.faults:
            cold, full = turns(f"turn, {fault}")
            ran = engine.generate(full, fault=fault)
            control = min(control, self._compared(full, cold, ran, fault)[0])
        cold, full = turns("turn")
        _, ran, reference = self._compared(full, cold, engine.generate(full))
        yield self._judged("next turn", ran, reference, PREFIX_TOKENS, control)

    def _tight_cells(self, engine: Engine) -> Iterator[Cell]:
        """Requests that do not fit together: the scheduler takes pages of one of them, with others in its steps."""
        requests = [Request(self._prompt(f"tight {number}", TURN_TOKENS), TURN_DECODED) for number in range(3)]
        ran = engine.generate(*requests)
        reference: list[Answer] = []
        at = 0
        for number, request in enumerate(requests):
            after = tuple(end - TURN_TOKENS for (_, end), (begin, _) in pairwise(ran.steps[number]) if begin < end)
            reference += self._again(ran, request, after, number)
            at = max(at, *_resumed(ran.steps[number]), 0)
        broken = [] if ran.preemptions else ["nothing was preempted"]
        broken += [] if at >= TURN_TOKENS else ["nothing was loaded"]
        broken += [f"left: {leak}" for leak in engine.leaks()]
        least = float("inf")
        for fault in self.model.faults:
            faulty = engine.generate(*requests, fault=fault)
            least = min(least, distance(ran.answers, faulty.answers) if faulty.faults else 0.0)
        yield judge(
            ENGINE, self.model.name, "too few pages", reference=reference, answers=ran.answers, control=least,
            broken=broken, figures={"preemptions": ran.preemptions, "resumed at": at},
        )  # fmt: skip

    # Without an engine

    def _spec_cells(self) -> Iterator[Cell]:
        log = self._folder / "specs.log"
        try:
            self._environment.run(SCRIPT_OF_SPECS, (), log=log, limit_s=EXAMPLE_LIMIT_S, variables=VARIABLES)
        except NotRunError as error:
            yield holds(ENGINE, self.model.name, "specs and kernels", [str(error)])
            return
        lines = log.read_text(errors="replace").splitlines()
        broken = [line for line in lines if line.startswith(("BROKEN", "not run"))]
        checks = sum(line.startswith("holds: ") for line in lines)
        broken += [] if checks else ["it checked nothing"]
        yield holds(ENGINE, self.model.name, "specs and kernels", broken, {"checks": checks})

    # Examples

    def _example_cells(self) -> Iterator[Cell]:
        for name, phrases in EXAMPLES.items():
            log = self._folder / f"{name}.log"
            self._environment.run(ROOT / "examples" / name, (), log=log, limit_s=EXAMPLE_LIMIT_S, variables=VARIABLES)
            said = log.read_text(errors="replace")
            missing = [f"it does not say {phrase!r}" for phrase in phrases if phrase not in said]
            yield holds(ENGINE, self.model.name, name, missing)


def _resumed(steps: Sequence[tuple[int, int]]) -> list[int]:
    """Where a request went on that had lost its pages."""
    return [begin for (_, end), (begin, _) in pairwise(steps) if begin < end]


def _upto(ran: Ran, tokens: int) -> tuple[int, ...]:
    """Where the steps ended that computed a prompt's first tokens, the last of them at `tokens`."""
    ends = tuple(end for end in ends_of(ran.steps[0]) if end < tokens)
    return (*ends, tokens) if tokens else ()


def _flip_bytes(folder: Path) -> int:
    """Flip a bit in each 4 KiB of every segment on disk; how many."""
    flipped = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix == ".arrow":
            with path.open("r+b") as file:
                for offset in range(2048, path.stat().st_size, 4096):
                    file.seek(offset)
                    value = file.read(1)
                    file.seek(offset)
                    file.write(bytes([value[0] ^ 1]))
                    flipped += 1
    return flipped
