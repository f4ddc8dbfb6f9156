"""Profiles as files, and those that ship with the package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ProfileError
from kvstore.limits import PROFILE_FILE_BYTES_MAX
from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.profiles import load_profile, profile_names, published_kv_throughput, write_profile
from kvstore.profiles.files import profile_from_text, profile_to_text
from tests.unit.test_profile import curves, sizes

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.profile import Curve

KIB_TOKENS = 1024
MIB = 1 << 20

notes = st.dictionaries(
    st.sampled_from(("prefill", "kv", "decode_step", "decode_batch_max")), st.text(min_size=1, max_size=50)
)


@given(
    prefill=curves, kv=sizes(), decode_step=curves, batch=st.integers(1, 4096), inferred=notes, name=st.text(min_size=1)
)
def test_what_is_written_is_read_back(
    prefill: Curve, kv: KvSize, decode_step: Curve, batch: int, inferred: dict[str, str], name: str
) -> None:
    profile = Profile(name, name, prefill, kv, decode_step, batch, 8, 131072, tuple(inferred.items()))
    assert profile_from_text(profile_to_text(profile)) == profile
    assert profile_from_text(profile_to_text(profile, details={"machine": [[1, 2], {"a": name}]})) == profile


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for name in ("first", "second"):
        profile = Profile(name, "a test", MeasuredCurve((1.0, 2.0), (1.0, 2.0)), KvSize(1, 1), MEMO, 1, 1, 64)
        write_profile(profile, path, details={"rounds": 3})
        assert load_profile(path) == profile
        assert load_profile(str(path)) == profile
    assert list(tmp_path.iterdir()) == [path]
    assert "      [1.0, 1.0],\n" in path.read_text(), "a point stands on one line"
    assert json.loads(path.read_text())["details"] == {"rounds": 3}


MEMO = PolynomialCurve((0.02,))
GOOD = json.loads(
    profile_to_text(Profile("good", "a test", PolynomialCurve((0.5, 0.1), 1000.0), KvSize(5, 7), MEMO, 4, 8, 1000))
)


def without(entry: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != entry}


POINTS: dict[str, Any] = {"points": [[1, 1], [2, 2]]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], 'no "format"'),
        ({**GOOD, "format": "kvstore.model-spec"}, 'no "format"'),
        ({**GOOD, "version": 2}, "version 2; this release reads version 1"),
        ({**GOOD, "version": True}, "version True"),
        (without("kv_bytes"), "'kv_bytes' is missing"),
        ({**GOOD, "prefil": {}}, "'prefil' is unknown"),
        ({**GOOD, "name": ""}, "name=''"),
        ({**GOOD, "source": 5}, "source=5 is not text"),
        ({**GOOD, "source": "x" * 5000}, "source='xxx.*[.][.][.] is not text of 1 to 4096"),
        ({**GOOD, "accelerators": 8.0}, "accelerators=8.0 is not a whole number"),
        ({**GOOD, "accelerators": True}, "accelerators=True"),
        ({**GOOD, "accelerators": 0}, "here: profile 'good': accelerators must be at least 1"),
        ({**GOOD, "prefill_s_by_tokens": 3}, "prefill_s_by_tokens is no object"),
        ({**GOOD, "prefill_s_by_tokens": {}}, "'prefill_s_by_tokens.points' is missing"),
        ({**GOOD, "prefill_s_by_tokens": {**POINTS, "unit": 5}}, "'prefill_s_by_tokens.unit' is unknown"),
        ({**GOOD, "prefill_s_by_tokens": {"points": [[1, 1, 1]]}}, "points=.* is not a list of pairs"),
        ({**GOOD, "decode_batch_max": 10**400}, "decode_batch_max=1000.* is not a whole number of at most 1e[+]18"),
        ({**GOOD, "kv_bytes": {**GOOD["kv_bytes"], "window_tokens": 10**400}}, "window_tokens=1000.* is not a whole"),
        ({**GOOD, "kv_bytes": {"state_bytes": 1, "token_bytes": 1e300}}, "token_bytes=1e[+]300 is not a number of at"),
        ({**GOOD, "prefill_s_by_tokens": {"points": [[1, "1"]]}}, "'1' is not a number of at most 1e[+]18"),
        ({**GOOD, "prefill_s_by_tokens": {"points": [[1, 10**400]]}}, "is not a number of at most 1e[+]18"),
        ({**GOOD, "prefill_s_by_tokens": {"points": [[999, 1e-9], [1000, 1]]}}, "1000 tokens|1 tokens would take"),
        ({**GOOD, "prefill_s_by_tokens": {"points": [[1, 2], [2, 1]]}}, "prefill_s_by_tokens: the curve falls"),
        ({**GOOD, "prefill_s_by_tokens": {**POINTS, "interpolation": "cubic"}}, "'cubic' is unknown"),
        ({**GOOD, "decode_step_s_by_requests": {"coefficients": [-1]}}, "decode_step_s_by_requests: coefficients"),
        ({**GOOD, "decode_step_s_by_requests": {"coefficients": 1}}, "is not a list of numbers"),
        ({**GOOD, "kv_bytes": {"state_bytes": 1}}, "'kv_bytes.token_bytes' is missing"),
        ({**GOOD, "kv_bytes": {"state_bytes": 0, "token_bytes": 0}}, "kv_bytes: KvSize"),
        ({**GOOD, "inferred": {"speed": "guessed"}}, "'inferred.speed' is unknown"),
        ({**GOOD, "inferred": {"kv": 1}}, "inferred.kv=1 is not text"),
    ],
)
def test_a_wrong_file_is_refused_by_name(document: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=message) as error:
        profile_from_text(json.dumps(document), "here")
    assert str(error.value).startswith("here")


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "format": 2}', '{"a": NaN}', "[" * 100_000, '"\ud800'])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match="here is no profile in JSON"):
        profile_from_text(text, "here")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_bytes(b" " * (PROFILE_FILE_BYTES_MAX + 1))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for name, message in (("none.json", "No such file"), ("large.json", "larger than"), ("binary.json", "not text")):
        with pytest.raises(ProfileError, match=message):
            load_profile(tmp_path / name)
    with pytest.raises(ProfileError, match="the package has kimi-linear-h200, "):
        load_profile(tmp_path / "none.json")
    with pytest.raises(ProfileError, match=r"'\\x00\.json' is no path"):
        load_profile("\0.json")
    with pytest.raises(ProfileError, match="no profile is named 'kimi'; there are kimi-linear-h200, "):
        load_profile("kimi")


def test_what_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    profile = Profile("x", "y" * 5000, MEMO, KvSize(1, 1), MEMO, 1, 1, 1)
    with pytest.raises(ProfileError, match="source="):
        write_profile(profile, tmp_path / "x.json")
    short = Profile("x", "y", MEMO, KvSize(1, 1), MEMO, 1, 1, 1)
    with pytest.raises(ProfileError, match="cannot be written"):
        write_profile(short, tmp_path / "none" / "x.json")
    with pytest.raises(ProfileError, match="the limit of a profile"):
        write_profile(short, tmp_path / "x.json", details={"log": "x" * PROFILE_FILE_BYTES_MAX})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", profile_names())
def test_profiles_of_the_package(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source.startswith("arXiv 2604.15039: ")
    assert profile.accelerators == 8
    assert profile_from_text(profile_to_text(profile)) == profile
    inferred = dict(profile.inferred)
    assert "decode_step" in inferred, "the paper prints nothing about decode steps"
    assert "kv" in inferred, "no size but those of the 1T model is printed, and those are fitted"


def test_the_1t_model_is_the_printed_one() -> None:
    h200, h20 = load_profile("paper-1t-h200"), load_profile("paper-1t-h20")
    printed = ((1, 0.44), (8, 0.72), (32, 1.84), (128, 7.40))
    assert h200.prefill == MeasuredCurve(
        tuple(KIB_TOKENS * k for k, _ in printed), tuple(seconds for _, seconds in printed)
    )
    assert h200.kv == h20.kv
    # The lengths at which the fit is exact (docs/profiles.md).
    for tokens, mib in ((1024, 190.8), (8192, 308.9), (32_000, 701.3), (130_000, 2316.3)):
        assert h200.kv.total_bytes(tokens) / MIB == pytest.approx(mib, abs=0.1)
    assert "prefill" not in dict(h200.inferred)
    assert "prefill" in dict(h20.inferred)


def test_throughputs_are_the_printed_ones() -> None:
    table = published_kv_throughput()
    assert [row.model for row in table if row.is_dense] == ["MiniMax-M2.5", "Qwen3-235B"]
    assert len(table) == 6
    for row in table:
        profile = load_profile(row.profile)
        assert "prefill" in dict(profile.inferred)
        for tokens, gbps in row.gbps:
            assert round(profile.kv_throughput_bytes_per_s(tokens) * 8e-9, 2) == gbps, (row.model, tokens)
    assert dict(table[0].gbps) == {1024: 1.19, 8192: 2.29, 32768: 3.87, 131072: 4.88}
    assert dict(table[5].gbps)[131072] == 21.50


# Public configurations, by the names that transformers gives their fields.
KIMI_FULL_LAYERS = (4, 8, 12, 16, 20, 24, 27)
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "kimi-linear-h200": (
        "kimi_linear",
        {
            "num_hidden_layers": 27,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "linear_num_heads": 32,
            "linear_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "layer_types": [
                "full_attention" if layer in KIMI_FULL_LAYERS else "linear_attention" for layer in range(1, 28)
            ],
        },
    ),
    "qwen3.5-397b-h200": (
        "qwen3_5_moe_text",
        {
            "num_hidden_layers": 60,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_value_heads": 64,
            "linear_num_key_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "minimax-m2.5-h200": ("minimax_m2", {"num_hidden_layers": 62, "num_key_value_heads": 8, "head_dim": 128}),
    "qwen3-235b-h200": (
        "qwen3_moe",
        {"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sizes_are_those_of_a_spec_of_the_model(name: str) -> None:
    """As far as kvstore knows the architecture; transformers keeps a fourth column of convolutions, engines three."""
    transformers = pytest.importorskip("transformers")
    from kvstore.spec import ModelSpec

    model_type, fields = CONFIGURATIONS[name]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    spec = ModelSpec.from_transformers(config, weights="x", dtype="bfloat16", block_tokens=64)
    kv = load_profile(name).kv
    for tokens in (1024, 131072):
        held = spec.bytes_by_group(tokens)
        assert kv.token_bytes * tokens == held.pop("attention")
        assert kv.resume_bytes(tokens) == pytest.approx(sum(held.values()), rel=0.02)
