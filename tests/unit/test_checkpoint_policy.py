"""At which lengths of a step an adapter keeps resume points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.adapters.paged import CheckpointPolicy

STATES = CheckpointPolicy(alignment_tokens=256, has_states=True)
WINDOWS = CheckpointPolicy(alignment_tokens=128, has_states=False, has_windows=True)
DENSE = CheckpointPolicy(alignment_tokens=16, has_states=False, block_tokens=64)
UNEVEN = CheckpointPolicy(alignment_tokens=48, has_states=False, has_windows=True, block_tokens=64)


@pytest.mark.parametrize(
    ("policy", "step", "prompt", "wanted", "lengths"),
    [
        # States exist at the end of a step only.
        (STATES, (0, 256), 700, (), (256,)),
        (STATES, (0, 300), 700, (), ()),
        (STATES, (0, 300), 700, (300,), (300,)),
        (STATES, (0, 300), 700, (280,), ()),
        (STATES, (512, 700), 700, (), (700,)),
        # While tokens are generated, at the engine's blocks.
        (STATES, (700, 701), 700, (), ()),
        (STATES, (767, 768), 700, (), (768,)),
        # Windows lie in pages for a while: the last of the engine's blocks, and what is wanted.
        (WINDOWS, (0, 512), 700, (), (512,)),
        (WINDOWS, (0, 600), 700, (130, 700), (130, 512)),
        (WINDOWS, (512, 700), 700, (), (640, 700)),
        (WINDOWS, (700, 701), 700, (), ()),
        # Every block of dense models is a resume point by itself: only where what is written ends is said.
        (DENSE, (0, 200), 200, (), (200,)),
        (DENSE, (0, 200), 400, (), (192,)),
        (DENSE, (200, 250), 400, (), ()),
        # The store takes resume points at its own blocks, and at the end.
        (UNEVEN, (0, 500), 500, (100, 128), (128, 384, 500)),
        (UNEVEN, (0, 500), 900, (400,), (384, 400)),
    ],
)
def test_lengths(
    policy: CheckpointPolicy, step: tuple[int, int], prompt: int, wanted: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    assert policy.lengths(*step, prompt, wanted) == lengths


@given(
    policy=st.builds(
        CheckpointPolicy, st.integers(1, 300), st.booleans(), st.booleans(), block_tokens=st.sampled_from([1, 16, 64])
    ),
    ends=st.sets(st.integers(1, 2000), min_size=1, max_size=20),
    wanted=st.sets(st.integers(-5, 2100), max_size=5),
)
def test_lengths_lie_in_the_step_and_the_prompts_end_is_among_them(
    policy: CheckpointPolicy, ends: set[int], wanted: set[int]
) -> None:
    prompt = max(ends)
    start = 0
    found: list[int] = []
    for stop in sorted(ends):
        lengths = policy.lengths(start, stop, prompt, wanted)
        assert all(start < length <= stop for length in lengths)
        assert all(length % policy.block_tokens == 0 for length in lengths[:-1])
        assert not policy.has_states or set(lengths) <= {stop}
        found += lengths
        start = stop
    assert found == sorted(set(found))
    assert found[-1] == prompt
