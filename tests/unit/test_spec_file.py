"""Spec files: what is written is read back with the same fingerprint, and nothing else is taken for a spec."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SpecError
from kvstore.limits import SPEC_FILE_BYTES_MAX
from kvstore.spec import (
    CacheGroup,
    DType,
    ModelSpec,
    ReuseRule,
    Segment,
    TensorSpec,
    load_spec,
    save_spec,
    spec_from_file_text,
    spec_to_file_text,
)
from kvstore.testing.specs import dense, hybrid, latent, pure_state, spans

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [dense(), hybrid(), latent(), pure_state(), spans()]
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small specs of both rules, windows included."""
    groups = []
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    for number, name in enumerate(names):
        window = draw(st.none() | st.integers(1, 64))
        rule = ReuseRule.STATE if window is not None else draw(st.sampled_from(ReuseRule))
        has_tokens = rule is ReuseRule.ATTENTION or window is not None
        units = draw(st.sampled_from([1, 2, 4]))
        segment = Segment("heads", units, draw(st.integers(1, 3)), replicated=units == 1 and draw(st.booleans()))
        inner = tuple(draw(st.lists(st.integers(1, 8), max_size=2)))
        tensors = tuple(
            TensorSpec(f"{name}_{part}", draw(st.sampled_from(DType)), (segment,), inner, has_tokens)
            for part in draw(st.lists(NAMES, min_size=1, max_size=2, unique=True))
        )
        layers = tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=5))))
        groups.append(CacheGroup(f"{name}_{number}", rule, layers, tensors, window))
    numerics = tuple(sorted(draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)).items()))
    weights = draw(st.text(min_size=1, max_size=20).filter(str.strip))
    return ModelSpec(draw(st.text(max_size=10)), weights, draw(st.integers(1, 256)), tuple(groups), numerics)


@given(specs())
def test_round_trip(spec: ModelSpec) -> None:
    again = spec_from_file_text(spec_to_file_text(spec))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    for spec in SPECS:
        save_spec(spec, path)
        assert load_spec(path) == spec
    document = json.loads(path.read_text())
    assert list(document) == ["format", "version", "fingerprint", "spec"]
    del document["fingerprint"]
    path.write_text(json.dumps(document))
    assert load_spec(path) == SPECS[-1]


def changed(**entries: Any) -> str:
    document = json.loads(spec_to_file_text(hybrid()))
    for name, value in entries.items():
        where = document["spec"] if name in document["spec"] else document
        where[name] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a model spec in JSON"),
        ("[]", 'has no "format": "kvstore.model-spec"'),
        ("[" * 100_000, "not a model spec in JSON"),
        ('{"format": "kvstore.model-spec", "version": 1, "version": 1}', "there twice"),
        ('{"format": "kvstore.model-spec", "version": NaN}', "NaN is no number"),
        ('{"format": "kvstore.model-spec", "version": 1}', "has no entry 'spec'"),
        (hybrid().to_json(), 'has no "format"'),
        (changed(version=2), "version 2; this release reads version 1"),
        (changed(version=True), "version True"),
        (changed(extra=1), "unknown entry 'extra'"),
        (changed(fingerprint="00"), "it was changed"),
        (changed(weights="other"), "it was changed"),
        (changed(weights=""), "identity of the weights"),
        (changed(model=5), "model=5 is no text"),
        (changed(numerics=[["a", 1]]), "are pairs of texts"),
        (changed(block_tokens=16.0), "16.0 is no whole number"),
        (changed(block_tokens=True), "block_tokens=True is no whole number"),
        (changed(spec=None), "not a model spec"),
    ],
)
def test_what_is_no_spec_file(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("[", r"\[")) as caught:
        spec_from_file_text(text, "model.json")
    assert "model.json" in str(caught.value)


def test_an_unknown_entry_deep_inside_is_noticed() -> None:
    document = json.loads(spec_to_file_text(hybrid()))
    del document["fingerprint"]
    document["spec"]["groups"][0]["tensors"][0]["scale"] = 2
    with pytest.raises(SpecError, match="does not know"):
        spec_from_file_text(json.dumps(document))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers and truth values."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, inner in items for place in _places(inner, (*path, key))]
    return [path] if isinstance(value, int) else []


def test_a_value_of_another_type_is_refused_wherever_it_stands() -> None:
    """1, 1.0 and true are equal in Python, and would be three fingerprints of one cache."""
    for place in _places(json.loads(hybrid().to_json())):
        document = json.loads(spec_to_file_text(hybrid()))
        del document["fingerprint"]
        where = document["spec"]
        for key in place[:-1]:
            where = where[key]
        value = where[place[-1]]
        for other in (float(value), int(value) if isinstance(value, bool) else bool(value)):
            where[place[-1]] = other
            with pytest.raises(SpecError):
                spec_from_file_text(json.dumps(document))


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A spec file with one value somewhere replaced or taken away."""
    document = json.loads(spec_to_file_text(draw(st.sampled_from(SPECS))))
    document.pop("fingerprint")
    place: Any = document["spec"]
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            break
        place = place[key]
    if draw(st.booleans()):
        del place[key]
    else:
        leaf = st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats(allow_nan=False) | st.text()
        place[key] = draw(leaf | st.lists(leaf, max_size=2) | st.dictionaries(st.text(max_size=3), leaf, max_size=1))
    return json.dumps(document)


@given(damaged())
def test_damage_is_refused_or_makes_another_sound_spec(text: str) -> None:
    try:
        spec = spec_from_file_text(text)
    except SpecError:
        return
    assert spec_from_file_text(spec_to_file_text(spec)) == spec
    assert spec.bytes_by_group(64)
    hash(spec)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        load_spec(tmp_path / "none.json")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
    with pytest.raises(SpecError, match=r"'a\\x00b' is no path"):
        load_spec("a\0b")
    path = tmp_path / "large.json"
    path.write_bytes(b" " * (SPEC_FILE_BYTES_MAX + 1))
    with pytest.raises(SpecError, match=r"larger than 16\.00 MiB"):
        load_spec(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="is not text"):
        load_spec(path)
