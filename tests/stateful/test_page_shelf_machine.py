"""An engine's pages change hands at random; what is found is what a plain model says, and is bit for bit right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.limits import PAGE_LOCATIONS_MAX
from kvstore.pool.prompt import Prompt
from kvstore.record import Record
from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.testing.shelf import Landing, intact, query_of
from kvstore.testing.specs import token_values

torch = pytest.importorskip("torch")

from kvstore.placement.gpu.page_shelf import PageHold, PageShelf  # noqa: E402
from kvstore.testing.pages import STYLES, EnginePages  # noqa: E402

TEST_S = 30.0
PAGES = 9
BLOCK = 2
SPEC = ModelSpec(
    "machine",
    "seed 0",
    BLOCK,
    (
        CacheGroup(
            "attention",
            ReuseRule.ATTENTION,
            (0,),
            tuple(TensorSpec(name, DType.INT32, (Segment("heads", 2, 1),), (2,), True) for name in ("keys", "values")),
        ),
    ),
)
PROMPTS = ((1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 7, 8, 8), (1, 2, 9, 9), (5, 5, 5, 5, 5, 5, 5))

Node = tuple[int, ...]
Place = tuple[int, tuple[int, ...]]
"""First token within the first page, and the pages."""


class PageShelfMachine(RuleBasedStateMachine):
    """The model: for each prefix that is noted, the places where its last block lies."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf: PageShelf | None = None
        self.model: dict[Node, list[Place]] = {}
        self.holds: list[tuple[PageHold, Node, dict[Node, Place]]] = []

    def open(self, style: str, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.engine = EnginePages.alike(SPEC, style=style, pages=PAGES, page_tokens=page_tokens)
        self.shelf = PageShelf(self.engine.register())
        self.written: dict[int, int] = {}

    def teardown(self) -> None:
        if self.shelf is not None:
            self.shelf.close()

    # The model

    def nodes(self, prompt: Node) -> list[Node]:
        """Prefixes that end at a block's end, and the whole prompt."""
        ends = [*range(BLOCK, len(prompt), BLOCK), len(prompt)]
        return [prompt[:end] for end in ends]

    def place(self, node: Node, pages: list[int]) -> Place:
        start = (len(node) - 1) // BLOCK * BLOCK
        first, last = start // self.page_tokens, (len(node) - 1) // self.page_tokens
        return start - first * self.page_tokens, tuple(pages[first : last + 1])

    def drop(self, gone: list[Node]) -> None:
        """With a whole block goes everything behind it."""
        for node in gone:
            for other in [each for each in self.model if each[: len(node)] == node and self.is_behind(node, each)]:
                del self.model[other]

    @staticmethod
    def is_behind(node: Node, other: Node) -> bool:
        return other == node or len(node) % BLOCK == 0

    def held_pages(self) -> set[int]:
        return {page for _, _, places in self.holds for _, pages in places.values() for page in pages}

    # What an engine does

    @rule(
        number=st.integers(0, len(PROMPTS) - 1),
        order=st.permutations(range(PAGES)),
        style=st.sampled_from(STYLES),
        page_tokens=st.integers(1, 5),
    )
    def compute_and_note(self, number: int, order: list[int], style: str, page_tokens: int) -> None:
        """Take back as many pages as the prompt needs, compute it there, and note it."""
        if self.shelf is None:
            self.open(style, page_tokens)
        assert self.shelf is not None
        ids = PROMPTS[number]
        free = [page for page in order if page not in self.held_pages()]
        pages = free[: -(-len(ids) // self.page_tokens)]
        if len(pages) * self.page_tokens < len(ids):
            return
        self.take_back(pages)
        prompt = Prompt.of(SPEC, ids)
        self.engine.put_prompt(prompt, pages)
        self.shelf.note(prompt, pages)
        for node in self.nodes(ids):
            places = self.model.setdefault(node, [])
            if len(places) < PAGE_LOCATIONS_MAX:
                places.append(self.place(node, pages))

    @precondition(lambda self: self.shelf is not None)
    @rule(pages=st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=4))
    def forget(self, pages: list[int]) -> None:
        """What is held is waited for; the rest is garbage from here on."""
        assert self.shelf is not None
        self.take_back(pages)

    def take_back(self, pages: list[int]) -> None:
        assert self.shelf is not None
        is_busy = bool(set(pages) & self.held_pages())
        if is_busy:
            with pytest.raises(DeadlineError):
                self.shelf.forget(pages, deadline_s=0)
        else:
            self.shelf.forget(pages, deadline_s=0)
        for node, places in tuple(self.model.items()):
            kept = [place for place in places if not set(place[1]) & set(pages)]
            places[:] = kept
            if not kept and node in self.model:
                self.drop([node])
        if not is_busy:
            for layer, name in self.engine.tensors:
                whole = self.engine.array(layer, name)
                whole[pages] = 0x5A5A5A5A
                self.engine.write(layer, name, whole)

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        assert self.shelf is not None
        node = data.draw(st.sampled_from(sorted(self.model)))
        is_held = any(each[: len(node)] == node for _, each, _ in self.holds)
        key = self.key(node)
        freed_bytes = self.shelf.evict(key)
        assert freed_bytes or is_held
        if freed_bytes:
            self.drop([node])

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def condemn(self, data: st.DataObject) -> None:
        """Held or not, nothing finds it any more."""
        assert self.shelf is not None
        node = data.draw(st.sampled_from(sorted(self.model)))
        self.shelf.condemn(self.key(node), is_state=False)
        self.drop([node])

    def key(self, node: Node) -> bytes:
        path = Prompt.of(SPEC, node).path
        return path.key(len(path) - 1)

    # What readers do

    @precondition(lambda self: bool(self.model) and len(self.holds) < 3)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        assert self.shelf is not None
        node = data.draw(st.sampled_from(sorted(self.model)))
        hold = self.shelf.hold(Prompt.of(SPEC, node).path, shard=WHOLE)
        assert hold is not None, "what is noted cannot be held"
        places = {}
        for row, location in enumerate(hold.locations):
            prefix = self.nodes(node)[int(hold.rows.table[row, 0])]
            place = location.start, tuple(location.pages.tolist())
            assert place in self.model[prefix], "a record is read from where it does not lie"
            places[prefix] = place
        self.holds.append((hold, node, places))

    @precondition(lambda self: bool(self.holds))
    @rule(data=st.data())
    def load_and_release(self, data: st.DataObject) -> None:
        """However much was said meanwhile of its pages, what is held is what it was."""
        hold, node, _ = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        assert list(hold.load(numbers, landing.addresses).wait(len(numbers), Deadline.after(TEST_S))) == []
        hold.release()
        self.check_content(hold, node, landing)

    def check_content(self, hold: PageHold, node: Node, landing: Landing) -> None:
        prompt = Prompt.of(SPEC, node)
        assert intact(hold.rows, np.arange(len(hold.rows)), landing.addresses)
        for number, (layout, header) in enumerate(zip(hold.rows.layouts(), hold.rows.headers(), strict=True)):
            record = Record(layout, landing.record(number)[: layout.record_bytes])
            end, valid = header.end_tokens, header.valid_tokens
            for name in ("keys", "values"):
                found: Any = record.tensor(0, name)
                wanted = token_values(SPEC, prompt, 0, name, end - valid, end)
                assert found[:, :valid].tobytes() == wanted.tobytes()
                assert not found[:, valid:].any()

    @invariant()
    def finds_what_the_model_says(self) -> None:
        if self.shelf is None:
            return
        self.shelf.check()
        for ids in PROMPTS:
            found = self.shelf.find(query_of(SPEC, Prompt.of(SPEC, [*ids, 0])))
            expected = []
            for node in self.nodes(ids):
                if node not in self.model:
                    break
                expected.append(len(node))
            assert [tokens for _, tokens, _ in found.candidates] == expected[::-1]


TestPageShelfMachine = PageShelfMachine.TestCase
TestPageShelfMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
