"""`kvstore profile` with real models: what it writes, and what it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.errors import ProfileError, SpecError, UnavailableError, UnsupportedModelError
from kvstore.profile import KvSize
from kvstore.profiles import load_profile, profile_names

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.profiles.measuring.transformers_model import TransformersModel  # noqa: E402
from tests.models.tiny import TINY, build_tiny  # noqa: E402

# Averages are allowed, since a loaded machine takes longer at any moment.
FEW = ("--lengths", "32,256", "--batches", "1,2", "--rounds", "2", "--steps", "2", "--context", "16", "--isotonic")


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], catch_exceptions=False)


def test_a_measured_profile_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    done = invoke("--out", path, *FEW, "--name", "mine")
    assert done.exit_code == 0, done.output
    assert f"wrote {path}" in done.stdout
    assert "One decode step" in done.stdout
    assert "round 2 of 2" in done.stderr
    profile = load_profile(path)
    assert profile.name == "mine"
    assert 0 < profile.prefill(32) <= profile.prefill(256)
    # 3 gated-delta layers of 4 heads of 16x16 in float32 with 4 columns of 128 channels, 1 layer of 2 KV heads of 16.
    assert profile.kv == KvSize(3 * (4 * 16 * 16 * 4 + 4 * 128 * 4), 2 * 2 * 16 * 4)
    assert (profile.decode_batch_max, profile.tokens_max, profile.accelerators) == (2, 256, 1)
    assert "weights: random, seed 0" in profile.source
    details = json.loads(path.read_text())["details"]
    assert [row["times"] for row in details["prefill_s"]] == [2, 2]
    assert [row["times"] for row in details["decode_step_s"]] == [4, 4]
    assert [row["held"] for row in details["cache_bytes"]] == [profile.kv.total_bytes(n) for n in (32, 256)]


def test_a_file_is_not_replaced_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("precious")
    with pytest.raises(ProfileError, match="is there already"):
        invoke("--out", path, *FEW)
    assert path.read_text() == "precious"
    done = invoke("--out", path, *FEW, "--model", "tiny-dense", "--force", "--json", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(path.read_text())
    assert load_profile(path).kv == KvSize(0, 4 * 2 * 2 * 16 * 2)


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_folder_with_or_without_weights(tmp_path: Path, has_weights: bool) -> None:
    folder = tmp_path / "my-model"
    model = build_tiny("qwen3")
    (model if has_weights else model.config).save_pretrained(folder)
    path = tmp_path / "mine.json"
    done = invoke("--model", folder, "--out", path, *FEW)
    assert done.exit_code == 0, done.output
    profile = load_profile(path)
    assert profile.name == "my-model"
    assert ("weights: of the folder my-model" if has_weights else "weights: random, seed 0") in profile.source


@pytest.mark.parametrize("name", TINY)
def test_sizes_of_a_spec_are_those_of_real_caches(name: str) -> None:
    subject = TransformersModel(build_tiny(name), name=name, weights="random")
    for tokens in (5, 40):
        assert subject.cache_bytes(tokens) == subject.kv.total_bytes(tokens)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--model", "gpt-5"), ProfileError, "neither one of tiny, tiny-dense, small, small-dense nor"),
        (("--lengths", "1k"), ProfileError, "--lengths='1k' is no list of whole numbers"),
        (("--batches", ""), ProfileError, "--batches='' is no list"),
        (("--rounds", "0"), ProfileError, "rounds=0"),
        (("--lengths", "200000"), ProfileError, "takes at most 131072 tokens"),
        (("--device", "tpu"), ProfileError, "knows no device 'tpu'"),
        (("--device", "meta"), ProfileError, "not one that is measured"),
        (("--device", "cuda:99"), UnavailableError, "'cuda:99' is not there"),
        (("--dtype", "int8"), ProfileError, "no number type 'int8'"),
        (("--dtype", "nn"), ProfileError, "no number type 'nn'"),
        (("--name", "n" * 5000), ProfileError, "--name has 5000 characters"),
        (("--name", ""), ProfileError, "--name has 0 characters"),
    ],
)
def test_what_cannot_be_measured(
    tmp_path: Path, arguments: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        invoke("--out", tmp_path / "x.json", *arguments)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no file"):
        invoke("--model", tmp_path, "--out", tmp_path / "x.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModelError, match="'t5' cannot be cached"):
        invoke("--model", tmp_path / "config.json", "--out", tmp_path / "x.json")
    with pytest.raises(ProfileError, match="there is no directory"):
        invoke("--out", tmp_path / "none" / "x.json")


def test_the_profiles_of_the_package_are_listed() -> None:
    done = invoke("--list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in profile_names())
    documents = json.loads(invoke("--list", "--json").stdout)
    assert [document["name"] for document in documents] == list(profile_names())


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = tmp_path / "mine.json"
    assert invoke("--out", path, *FEW, "--device", "cuda").exit_code == 0
    assert torch.cuda.get_device_name() in load_profile(path).source
