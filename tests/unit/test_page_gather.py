"""Pages to packed memory and back, in any layout, against a loop over tokens in NumPy."""

from __future__ import annotations

import importlib
import mmap
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import SpecError, UnavailableError
from kvstore.record.rows import local_rows
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, Shard, TensorSpec
from kvstore.testing.specs import hybrid

torch = pytest.importorskip("torch")

from kvstore.testing.pages import STYLES, EnginePages  # noqa: E402
from kvstore.tiers.gpu.packing import Packing, PagePlaces, packings_of_tensors, tensor_views  # noqa: E402
from kvstore.tiers.gpu.pages import PagedTensor, Pages, choose_gather, state_pages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA"))
DTYPES = (DType.UINT8, DType.FLOAT8_E4M3FN, DType.BFLOAT16, DType.FLOAT32, DType.INT64)
MAP_NORESERVE = 0x4000
"""Of Linux; Python's `mmap` has no name for it everywhere."""


@pytest.fixture(params=["native", "index", "triton"])
def gather(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each implementation on the CPU; the Triton kernel through its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed; its interpreter needs no GPU")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        fresh_triton()
    yield request.param
    if request.param == "triton":
        monkeypatch.undo()
        fresh_triton()


def fresh_triton() -> None:
    """Whether a kernel is interpreted is decided when its module is imported."""
    from kvstore.tiers.gpu import pages

    pages._triton_gather.cache_clear()
    sys.modules.pop("kvstore.tiers.gpu.gather_triton", None)
    importlib.invalidate_caches()


def dense(block_tokens: int, dtype: DType, heads: int, inner: tuple[int, ...], layers: int = 2) -> ModelSpec:
    segment = (Segment("heads", heads, 1),)
    tensors = tuple(TensorSpec(name, dtype, segment, inner, True) for name in ("keys", "values"))
    group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(layers)), tensors)
    return ModelSpec("paged", "seed 0", block_tokens, (group,))


def packed_tokens(
    pages: Pages, group: int, layers: tuple[int, ...], places: PagePlaces
) -> tuple[dict[int, Packing], Any, np.ndarray[Any, Any]]:
    """Memory for one image, full of another byte, and the same on the host after `pack`."""
    packings, size_bytes = packings_of_tensors(pages.spec.groups[group], pages.shard, layers, len(places))
    packed = torch.full((size_bytes,), 0xA5, dtype=torch.uint8, device=pages.device.name)
    pages.pack(group, packings, places, packed)
    return packings, packed, packed.cpu().numpy()


@st.composite
def engines(draw: st.DrawFn) -> tuple[EnginePages, list[int], int, int]:
    """A dense model in pages of any layout, pages of a prompt, and a range of its tokens."""
    dtype = draw(st.sampled_from(DTYPES))
    heads, block = draw(st.sampled_from((1, 2, 6))), draw(st.integers(1, 9))
    inner = draw(st.sampled_from(((1,), (4,), (6,), (2, 3), (16,))))
    page_tokens = draw(st.integers(1, 9))
    pages = draw(st.integers(1, 7))
    spec = dense(block, dtype, heads, inner)
    shard = draw(st.sampled_from((Shard(), Shard(1, 2)))) if heads > 1 else Shard()
    engine = EnginePages.alike(
        spec, style="canonical", pages=pages, page_tokens=page_tokens, shard=shard, seed=draw(st.integers(0, 99))
    )
    # Any order of the axes, gaps before and behind each, keys and values with different ones.
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    for (layer, name), paged in tuple(engine.tensors.items()):
        shape = list(paged.tensor.shape)
        names = ["page", "row", "token", *["inner"] * len(inner)]
        order = list(draw(st.permutations(range(len(shape)))))
        inner_axes = iter(sorted(axis for axis in order if axis >= 3))
        order = [next(inner_axes) if axis >= 3 else axis for axis in order]
        gaps = [draw(st.integers(0, 2)) for _ in order]
        whole = [shape[axis] + gap for axis, gap in zip(order, gaps, strict=True)]
        size = paged.tensor.element_size()
        raw = torch.from_numpy(rng.integers(0, 256, int(np.prod(whole)) * size, np.uint8)).view(paged.tensor.dtype)
        cut = tuple(slice(gap, gap + shape[axis]) for axis, gap in zip(order, gaps, strict=True))
        axes = " ".join(names[axis] for axis in order)
        engine.tensors[layer, name] = PagedTensor(raw.reshape(whole)[cut], axes)
        engine.allocations.append(raw)
    ids = draw(st.permutations(range(pages)))[: draw(st.integers(1, pages))]
    start = draw(st.integers(0, len(ids) * page_tokens - 1))
    stop = draw(st.integers(start + 1, len(ids) * page_tokens))
    return engine, list(ids), start, stop


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=engines())
def test_any_layout_packs_and_unpacks(drawn: tuple[EnginePages, list[int], int, int], gather: str) -> None:
    """Bit for bit what a loop over tokens finds; unpacking elsewhere writes those tokens and nothing else."""
    check_round_trip(*drawn, gather=gather)


def check_round_trip(engine: EnginePages, ids: list[int], start: int, stop: int, *, gather: str) -> None:
    pages = engine.register(gather=gather)
    size = engine.page_tokens["attention"]
    places = PagePlaces.of_tokens(np.array(ids), size, start, stop)
    layers = engine.spec.groups[0].layers
    packings, packed, host = packed_tokens(pages, 0, layers, places)
    for layer in layers:
        views = tensor_views(host, packings, engine.spec.groups[0], engine.shard, layer)
        for name in ("keys", "values"):
            assert views[name].tobytes() == engine.tokens(layer, name, ids, start, stop).tobytes()
    # Into other pages, in the opposite order; what is not named stays as it is.
    others = list(reversed(range(engine.pages)))
    expected = {}
    for layer in layers:
        for name in ("keys", "values"):
            whole = engine.array(layer, name)
            moved = engine.tokens(layer, name, ids, start, stop)
            for number, at in enumerate(range(start, stop)):
                whole[others[at // size], :, at % size] = moved[:, number]
            expected[layer, name] = whole
    # A copy in which the moved tokens are written by the oracle: all bytes must agree, those of gaps included.
    untouched = [allocation.clone() for allocation in engine.allocations]
    pages.unpack(0, packings, PagePlaces.of_tokens(np.array(others), size, start, stop), packed)
    for (layer, name), whole in expected.items():
        assert engine.array(layer, name).tobytes() == whole.tobytes()
    after = [allocation.clone() for allocation in engine.allocations]
    for allocation, before in zip(engine.allocations, untouched, strict=True):
        allocation.copy_(before)
    for (layer, name), whole in expected.items():
        engine.write(layer, name, whole)
    for allocation, found in zip(engine.allocations, after, strict=True):
        assert torch.equal(allocation.view(torch.uint8), found.view(torch.uint8))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("block", "page_tokens"), [(4, 4), (4, 2), (4, 8), (4, 3)])
def test_layouts_of_engines(style: str, block: int, page_tokens: int, gather: str) -> None:
    spec = dense(block, DType.BFLOAT16, 2, (8,))
    engine = EnginePages.alike(spec, style=style, pages=6, page_tokens=page_tokens)
    stop = 3 * page_tokens - 1
    check_round_trip(engine, [4, 0, 5], 1, stop, gather=gather)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gaps_between_tokens_stay(device: str, gather: str) -> None:
    """What an engine keeps between the parts that were registered is not touched, nor any page that was not named."""
    if device == "cuda" and gather != "index":
        pytest.skip("another device's, or interpreted; what is not told how to gather runs the compiled kernel")
    spec = dense(2, DType.FLOAT32, 2, (4,), layers=1)
    both = torch.arange(5 * 2 * 3 * 8, dtype=torch.float32, device=device).reshape(5, 2, 3, 8)
    pages = Pages(spec, {(0, "keys"): both[..., :4], (0, "values"): both[..., 4:]}, gather=gather)
    before = both.clone()
    places = PagePlaces.of_tokens(np.array([3]), 3, 1, 3)
    packings, size_bytes = packings_of_tensors(spec.groups[0], pages.shard, (0,), 2)
    packed = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    pages.unpack(0, {0: packings[0]}, places, packed)
    expected = before.clone()
    expected[3, :, 1:3, :4] = 0
    assert torch.equal(both, expected)


def test_places_without_a_token(gather: str) -> None:
    """They are packed as zeros, as the padding of a partial block has to be, and are not unpacked."""
    spec = dense(4, DType.FLOAT32, 2, (4,), layers=1)
    engine = EnginePages.alike(spec, pages=3, page_tokens=4)
    pages = engine.register(gather=gather)
    places = PagePlaces.of_tokens(np.array([2]), 4, 0, 3, 4)
    packings, packed, host = packed_tokens(pages, 0, (0,), places)
    keys = tensor_views(host, packings, spec.groups[0], pages.shard, 0)["keys"]
    assert keys[:, :3].tobytes() == engine.tokens(0, "keys", [2], 0, 3).tobytes()
    assert not keys[:, 3].any()
    before = engine.array(0, "keys")
    pages.unpack(0, packings, PagePlaces.of_tokens(np.array([1]), 4, 0, 3, 4), packed)
    before[1, :, :3] = keys[:, :3]
    assert engine.array(0, "keys").tobytes() == before.tobytes()


def test_states_of_a_hybrid(gather: str) -> None:
    """Recurrent and convolution states lie in the pages that attention uses, each with its own type."""
    spec = hybrid(4)
    engine = EnginePages.alike(spec, style="one allocation", pages=5)
    pages = engine.register(gather=gather)
    number = next(i for i, group in enumerate(spec.groups) if group.name == "state")
    packings, packed, host = packed_tokens(pages, number, (0, 2), PagePlaces.of_states(np.array([3])))
    for layer in (0, 2):
        views = tensor_views(host, packings, spec.groups[number], pages.shard, layer)
        for name in ("conv", "recurrent"):
            assert views[name].tobytes() == engine.array(layer, name)[3].tobytes()
    before = {name: engine.array(2, name) for name in ("conv", "recurrent")}
    pages.unpack(number, packings, PagePlaces.of_states(np.array([1])), packed)
    for name, whole in before.items():
        whole[1] = whole[3]
        assert engine.array(2, name).tobytes() == whole.tobytes()


def test_the_wrong_page_is_noticed(gather: str) -> None:
    """The comparison above can fail: another page, another offset and another layer give other bytes."""
    engine = EnginePages.alike(dense(4, DType.BFLOAT16, 2, (8,)), pages=4)
    pages = engine.register(gather=gather)
    for ids, offset, layer in (([1], 0, 0), ([2], 1, 0), ([2], 0, 1)):
        packings, _, host = packed_tokens(
            pages, 0, (layer,), PagePlaces.of_tokens(np.array(ids), 4, offset, 2 + offset)
        )
        found = tensor_views(host, packings, engine.spec.groups[0], pages.shard, layer)["keys"]
        assert found.tobytes() != engine.tokens(0, "keys", [2], 0, 2).tobytes()


def test_several_images(gather: str) -> None:
    """Records follow one another; each image has its own pages."""
    spec = dense(4, DType.FLOAT32, 2, (4,))
    engine = EnginePages.alike(spec, pages=8, page_tokens=2)
    pages = engine.register(gather=gather)
    rows = local_rows(spec.groups[0], 0, pages.shard)
    layer_bytes = rows * 4 * 16
    packing = Packing((0, 1), 3, 2 * layer_bytes + 64, 4, (64, 64 + layer_bytes))
    parts = [PagePlaces.of_tokens(np.array(ids), 2, 0, 4) for ids in ([0, 5], [7, 1], [3, 2])]
    packed = torch.zeros(3 * packing.image_bytes, dtype=torch.uint8)
    pages.pack(0, {1: packing}, PagePlaces.join(parts), packed)
    for image, ids in enumerate(([0, 5], [7, 1], [3, 2])):
        for layer in (0, 1):
            begin = image * packing.image_bytes + packing.layer_offsets[layer]
            found = packed.numpy()[begin : begin + layer_bytes].tobytes()
            assert found == engine.tokens(layer, "values", ids, 0, 4).tobytes()


# What may be registered


def register(**changed: Any) -> Pages:
    spec = dense(4, DType.FLOAT32, 2, (4,), layers=1)
    keys = torch.zeros(3, 2, 4, 4)
    tensors: dict[tuple[int, str], Any] = {(0, "keys"): keys, (0, "values"): torch.zeros(3, 2, 4, 4)}
    tensors[0, "keys"] = changed.pop("keys", keys)
    if changed.pop("without_values", False):
        del tensors[0, "values"]
    return Pages(spec, tensors, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"keys": torch.zeros(3, 2, 4, 4, dtype=torch.float16)},
            "'keys' of layer 0 has type float16, the spec says float32",
        ),
        ({"keys": torch.zeros(3, 3, 4, 4)}, "has 3 rows; worker 0 of 1 holds 2"),
        ({"keys": torch.zeros(3, 2, 4, 8)}, r"has inner axes \[8\], the spec says \[4\]"),
        ({"keys": torch.zeros(5, 2, 4, 4)}, "pages of different number"),
        ({"keys": torch.zeros(3, 2, 8, 4)}, "pages of different number"),
        ({"keys": torch.zeros(3, 2, 4).expand(3, 2, 4).unsqueeze(-1).expand(3, 2, 4, 4)}, "overlaps"),
        ({"keys": torch.zeros(6)}, "has 1 axes, and 3 are named"),
        ({"keys": PagedTensor(torch.zeros(3, 4, 2, 4), "page token head inner")}, "name 'page' and 'row' once each"),
        ({"keys": PagedTensor(torch.zeros(3, 2, 16), "page row inner")}, "needs an axis 'token'"),
        ({"keys": np.zeros((3, 2, 4, 4), np.float32)}, "is ndarray, no plain torch tensor"),
        ({"without_values": True}, "is registered without 'values'"),
        ({"pools": {"window": "other"}}, "'window', which is no cache group"),
        ({"shard": Shard(0, 2)}, "has 2 rows; worker 0 of 2 holds 1"),
    ],
)
def test_what_cannot_be_registered(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        register(**changed)


def test_page_ids_are_checked() -> None:
    pages = register()
    assert pages.ids(0, torch.tensor([2, 0])).tolist() == [2, 0]
    for wrong in ([3], [-1], [0.5], [[0]], ["a"]):
        with pytest.raises(SpecError, match="page"):
            pages.ids(0, wrong)
    packings, size_bytes = packings_of_tensors(pages.spec.groups[0], pages.shard, (0,), 1)
    with pytest.raises(SpecError, match="page 3 of group 'attention' is none of its 3 pages"):
        pages.pack(
            0, packings, PagePlaces.of_tokens(np.array([3]), 4, 0, 1), torch.zeros(size_bytes, dtype=torch.uint8)
        )


def test_states_must_fit_into_their_pages() -> None:
    raw = torch.zeros(4, 1, 1, 100, dtype=torch.int8)
    assert state_pages(raw, torch.float32, (2, 3), 4).shape == (4, 2, 3)
    for offset, message in ((80, "does not fit"), (3, "not aligned")):
        with pytest.raises(SpecError, match=message):
            state_pages(raw, torch.float32, (2, 3), offset)
    with pytest.raises(SpecError, match="gaps"):
        state_pages(torch.zeros(4, 10, 10).transpose(1, 2), torch.float32, (1,))


def test_which_gather_runs_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    found, why = choose_gather("cpu")
    assert (found.name, why) == ("native", "")
    with pytest.raises(UnavailableError, match="device cuda"):
        choose_gather("cuda", "native")
    with pytest.raises(UnavailableError, match="cpu"):
        choose_gather("cpu", "triton")
    with pytest.raises(UnavailableError, match="no gather 'fast'"):
        choose_gather("cpu", "fast")
    monkeypatch.setenv("KVSTORE_PAGE_GATHER", "index")
    assert choose_gather("cuda")[0].name == "index"
    monkeypatch.setenv("KVSTORE_PAGE_GATHER", "triton")
    with pytest.raises(UnavailableError, match="Triton"):
        choose_gather("cpu")
    monkeypatch.delenv("KVSTORE_PAGE_GATHER")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, why = choose_gather("cuda")
    assert found.name == "index"
    assert "not installed" in why


def test_pages_more_than_two_billion_elements_apart(gather: str) -> None:
    """Offsets need 64 bits. The memory between the pages is never touched, so it takes none."""
    page_stride = (1 << 31) + 11  # odd, so that a kernel moves single bytes, and counts these
    try:
        reserved = mmap.mmap(-1, 2 * page_stride + 100, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"4 GiB of addresses cannot be had: {error}")
    flat = torch.frombuffer(reserved, dtype=torch.uint8)
    tensors = {
        name: flat.as_strided((3, 2, 3, 4), (page_stride, 12, 4, 1), begin)
        for name, begin in (("keys", 0), ("values", 40))
    }
    spec = dense(2, DType.UINT8, 2, (4,), layers=1)
    pages = Pages(spec, {(0, name): tensor for name, tensor in tensors.items()}, gather=gather)
    numbers = torch.arange(48, dtype=torch.uint8).reshape(2, 2, 3, 4)
    tensors["keys"][0], tensors["keys"][2] = numbers
    places = PagePlaces.of_tokens(np.array([2, 0]), 3, 1, 6)
    packings, size_bytes = packings_of_tensors(spec.groups[0], pages.shard, (0,), 5)
    packed = torch.zeros(-(-size_bytes // 64) * 64, dtype=torch.uint8)
    pages.pack(0, {0: packings[0]}, places, packed)
    expected = torch.cat([numbers[1][:, 1:], numbers[0]], dim=1)
    assert torch.equal(packed[:40].reshape(2, 5, 4), expected)
    places = PagePlaces.of_tokens(np.array([1, 2]), 3, 1, 6)
    pages.unpack(0, {0: packings[0]}, places, packed)
    assert torch.equal(torch.cat([tensors["keys"][1][:, 1:], tensors["keys"][2]], dim=1), expected)
    assert not tensors["values"][1].any()
