"""What names an SSD tier, how writes are budgeted, and how records are spread over drives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ConfigError, UnavailableError
from kvstore.placement.ssd import SsdOptions, SsdPlace
from kvstore.placement.ssd.budget import DAY_S, BudgetState, WriteBudget, load_state, save_state
from kvstore.placement.ssd.places import checksums_of, drives_of, places_of, slots_of
from kvstore.placement.ssd.stripes import stripe
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.tiers.ssd import engine
from kvstore.tiers.ssd.engine import choose_engine

GIB = 1 << 30


def test_text_names_directories() -> None:
    assert SsdOptions.of("/a:2GiB").places == (SsdPlace("/a", 2 * GIB),)
    assert SsdOptions.of("C:/a:2GiB").places == (SsdPlace("C:/a", 2 * GIB),)
    several = SsdOptions.of(["/a:2GiB", SsdPlace("/b", GIB)])
    assert several.places == (SsdPlace("/a", 2 * GIB), SsdPlace("/b", GIB))
    assert several.capacity_bytes == 3 * GIB
    assert SsdOptions.of(several) is several
    assert SsdOptions("/a:2GiB").places == several.places[:1]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("/a", "has no capacity"),
        ("/a:much", "not a size"),
        (":1GiB", "no path"),
        ("/a:4KiB", "the least is"),
        ([], "1 to 64"),
        (["/a:1GiB", "/a:2GiB"], "each directory once"),
        (["/a:1GiB", "/b/../a:2GiB"], "each directory once"),
        (5, "names no directories"),
        ([5], "names no directories"),
        (Path("/a"), "names no directories"),
        ([f"/{number}:1GiB" for number in range(65)], "1 to 64"),
    ],
)
def test_what_cannot_be_is_said(what: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SsdOptions.of(what)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["write_bytes_per_day", "queue_bytes", "batch_bytes", "write_deadline_s"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SsdOptions("/a:1GiB", **{name: 0})  # type: ignore[arg-type]


def test_sizes_are_parsed() -> None:
    assert SsdOptions("/a:1GiB", write_bytes_per_day="2GiB").daily_bytes == 2 * GIB
    assert SsdOptions("/a:1GiB").daily_bytes is None
    with pytest.raises(ConfigError, match="write_bytes_per_day of an SSD tier: 'much' is not a size"):
        SsdOptions("/a:1GiB", write_bytes_per_day="much")


def test_an_engine_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="there is no engine 'magic' of file I/O; name one of io_uring, threads"):
        choose_engine("magic")
    monkeypatch.setattr(engine, "file_engines", lambda _: [("io_uring", "the kernel forbids it"), ("threads", "")])
    with pytest.raises(UnavailableError, match="'io_uring' of file I/O cannot run here: the kernel forbids it"):
        choose_engine("io_uring")
    assert choose_engine("threads").name == "threads"


# Budget


class Wall:
    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@given(steps=st.lists(st.tuples(st.floats(0, DAY_S / 4), st.integers(1, 300)), max_size=200))
def test_a_day_has_its_limit(steps: list[tuple[float, int]]) -> None:
    """In any 24 hours no more than the budget, whatever is asked for, but for what one batch takes beyond."""
    wall = Wall()
    budget = WriteBudget(1000, now=wall)
    spent: list[tuple[float, int]] = []
    for passed_s, size_bytes in steps:
        wall.now_s += passed_s
        if budget.allows(size_bytes):
            budget.spend(size_bytes)
            spent.append((wall.now_s, size_bytes))
    for begin_s, _ in spent:
        within = [size for at_s, size in spent if begin_s <= at_s <= begin_s + DAY_S]
        assert sum(within) <= 1000 + max(within)


def test_a_budget_fills_again_and_survives() -> None:
    wall = Wall()
    budget = WriteBudget(800, now=wall)
    assert budget.allows(100)
    budget.spend(100)
    assert not budget.allows(1)
    state = BudgetState.unpacked(budget.state().packed())
    assert state is not None
    again = WriteBudget(800, state, now=wall)
    assert not again.allows(1)
    wall.now_s += DAY_S / 700 + 1
    assert again.allows(1)
    wall.now_s += 10 * DAY_S
    assert again.allows(100)
    again.spend(100)
    assert not again.allows(1), "a bucket holds no more than its share"


def test_a_clock_that_goes_back_gives_nothing() -> None:
    wall = Wall()
    budget = WriteBudget(800, BudgetState(wall.now_s + DAY_S, 0.0), now=wall)
    assert not budget.allows(1)
    wall.now_s -= DAY_S
    assert not budget.allows(1)
    wall.now_s += DAY_S
    assert budget.allows(100)


def test_no_budget_allows_everything() -> None:
    budget = WriteBudget(None)
    budget.spend(1 << 60)
    assert budget.allows(1 << 60)
    assert not budget.is_limited


def test_the_budget_is_saved_beside_the_segments() -> None:
    disk = ForgetfulDisk()
    files = disk.files()
    assert load_state(files) is None
    for left_bytes in (5.0, -7.5):
        save_state(files, BudgetState(1e9, left_bytes))
        assert load_state(files) == BudgetState(1e9, left_bytes)
    disk.flip("budget", 100)
    assert load_state(files) is None
    disk.cut_file("budget", 10)
    assert load_state(files) is None
    files.close()


# Drives


@given(
    sizes=st.lists(st.sampled_from([4096, 8192, 1 << 20]), min_size=1, max_size=200),
    weights=st.lists(st.integers(1, 8), min_size=1, max_size=5),
)
def test_each_drive_gets_its_share(sizes: list[int], weights: list[int]) -> None:
    given_bytes = np.array(sizes, np.int64)
    chosen = stripe(given_bytes, weights)
    for drive, weight in enumerate(weights):
        share = given_bytes[chosen == drive].sum()
        assert share <= given_bytes.sum() * weight / sum(weights) + (len(weights) + 1) * given_bytes.max()


def test_equal_drives_take_turns() -> None:
    assert stripe(np.full(6, 4096, np.int64), [1, 1, 1]).tolist() == [0, 1, 2, 0, 1, 2]


def test_slots_name_places() -> None:
    places = np.array([[1, 4096, 8192], [(1 << 40) + 3, 1 << 43, 1 << 26]], np.uint64)
    checksums = np.array([0xDEADBEEF, 7], np.uint32)
    slots = slots_of(63, places, checksums)
    assert (places_of(slots) == places).all()
    assert (checksums_of(slots) == checksums).all()
    assert (drives_of(slots) == 63).all()
