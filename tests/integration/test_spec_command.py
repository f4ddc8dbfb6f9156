"""`kvstore spec`: from a model's folder to a file that a node reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.errors import SpecError
from kvstore.spec import ModelSpec, load_spec

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

CONFIG = transformers.LlamaConfig(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16"
)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_the_file_holds_the_spec_of_the_configuration(tmp_path: Path, what: str) -> None:
    CONFIG.save_pretrained(tmp_path)
    given = tmp_path if what == "folder" else tmp_path / "config.json"
    done = CliRunner().invoke(app, ["spec", str(given), "--weights", "sha256:x", "--block-tokens", "32"])
    assert done.exit_code == 0, done.output
    path = tmp_path / "spec.json"
    path.write_text(done.stdout)
    spec = ModelSpec.from_transformers(CONFIG, weights="sha256:x", block_tokens=32)
    assert load_spec(path) == spec
    assert done.stderr.startswith("llama: attention (2 layers); 2.00 MiB after 8192 tokens; fingerprint ")
    assert done.stderr.strip().endswith(spec.fingerprint.hex()[:16])


def test_what_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "t5"}))
    for name, message in (("none.json", "is no file"), ("broken.json", "cannot read"), ("other.json", "t5")):
        with pytest.raises(SpecError, match=message):
            CliRunner().invoke(app, ["spec", str(tmp_path / name), "--weights", "x"], catch_exceptions=False)
