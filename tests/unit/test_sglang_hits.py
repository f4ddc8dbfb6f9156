"""Up to which lengths a prefix can be restored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.adapters.sglang.hits import ALL_PAGES, BLOCK_GROUPS, TRAILING_PAGES, PoolPages, restorable


def pool(flags: str, policy: str = TRAILING_PAGES, window: int = 1, name: str = "mamba") -> PoolPages:
    return PoolPages(name, policy, [flag == "x" for flag in flags], window)


def test_without_other_pools_the_anchor_decides() -> None:
    found = restorable("kv", 3, [])
    assert (found.pages, found.lengths, found.pool_pages) == (3, (1, 2, 3), {"kv": 3})
    assert restorable("kv", 0, []).pool_pages == {}


def test_a_state_is_needed_at_the_end_only() -> None:
    found = restorable("kv", 6, [pool(".x.x..")])
    assert (found.pages, found.lengths, found.pool_pages) == (4, (2, 4), {"kv": 6, "mamba": 4})


def test_a_state_beyond_the_anchor_counts_for_nothing() -> None:
    assert restorable("kv", 2, [pool("...xxx")]) == restorable("kv", 2, [pool("..")])
    assert restorable("kv", 2, [pool("..xx")]).pages == 0


def test_a_window_is_whole_or_no_hit() -> None:
    assert restorable("kv", 5, [pool("xx.xx", window=2)]).lengths == (1, 2, 5)
    assert restorable("kv", 5, [pool(".x.x.", window=2)]).lengths == ()
    # A window longer than the span begins in the span's prefix, which is elsewhere.
    assert restorable("kv", 2, [pool("xx", window=9)]).lengths == (1, 2)
    assert restorable("kv", 2, [pool(".x", window=9)]).lengths == ()


def test_a_pool_needed_for_all_pages_cuts() -> None:
    found = restorable("kv", 5, [pool("xxx.x", ALL_PAGES, name="indexer")])
    assert (found.pages, found.pool_pages) == (3, {"kv": 5, "indexer": 3})


def test_the_length_is_one_at_which_every_pool_fits() -> None:
    """Not the least of the pools' own lengths: neither 4 nor 3 has both states here."""
    found = restorable("kv", 6, [pool(".x.x.."), pool(".xx...", name="swa")])
    assert (found.pages, found.lengths) == (2, (2,))
    assert found.pool_pages == {"kv": 6, "mamba": 4, "swa": 3}


def test_block_groups_are_no_condition() -> None:
    assert restorable("kv", 4, [pool("....", BLOCK_GROUPS, name="c4")]).pages == 4


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown hit policy"):
        restorable("kv", 4, [pool("xxxx", "some_pages")])


POOLS = st.lists(
    st.builds(
        PoolPages,
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([ALL_PAGES, TRAILING_PAGES]),
        st.lists(st.booleans(), min_size=12, max_size=12),
        st.integers(0, 5),
    ),
    max_size=3,
)


@given(st.integers(0, 12), POOLS)
def test_as_the_definition_says(anchor_pages: int, pools: list[PoolPages]) -> None:
    def fits(each: PoolPages, length: int) -> bool:
        needed = (
            range(length) if each.policy == ALL_PAGES else range(max(0, length - max(1, each.window_pages)), length)
        )
        return all(each.is_present[page] for page in needed)

    expected = [length for length in range(1, anchor_pages + 1) if all(fits(each, length) for each in pools)]
    found = restorable("kv", anchor_pages, pools)
    assert found.lengths == tuple(expected)
    assert found.pages == max(expected, default=0)
    for each in pools:
        if len([other for other in pools if other.name == each.name]) == 1:
            own = [length for length in range(1, anchor_pages + 1) if fits(each, length)]
            assert found.pool_pages.get(each.name, 0) == max(own, default=0)
