"""`kvstore spec`: the spec file of a `transformers` configuration."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kvstore.errors import SpecError, UnavailableError
from kvstore.spec import ModelSpec, spec_to_file_text
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE_TOKENS = 8192


def run_spec(config: Path, *, weights: str, block_tokens: int, dtype: str | None) -> int:
    """Print the file to standard output, and what it says to standard error; the exit status."""
    spec = ModelSpec.from_transformers(read_config(config), weights=weights, block_tokens=block_tokens, dtype=dtype)
    sys.stdout.write(spec_to_file_text(spec))
    held_bytes = sum(spec.bytes_by_group(EXAMPLE_TOKENS).values())
    groups = ", ".join(f"{group.name} ({len(group.layers)} layers)" for group in spec.groups)
    print(
        f"{spec.model}: {groups}; {format_bytes(held_bytes)} after {EXAMPLE_TOKENS} tokens; fingerprint "
        f"{spec.fingerprint.hex()[:16]}",
        file=sys.stderr,
    )
    return 0


def read_config(path: Path) -> Any:
    """The configuration in a model's folder, or in its `config.json`. Nothing is downloaded, no code of the model runs.

    Raises:
        SpecError: there is none, or it cannot be read. UnavailableError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UnavailableError(
            f"reading a configuration needs transformers ({error}); pip install 'kvstore[transformers]', or write the "
            "spec by hand and save it with kvstore.spec.save_spec"
        ) from error
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SpecError(f"{file} is no file; give a model's folder or its config.json")
    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its configuration classes raise
        raise SpecError(f"transformers cannot read {file} ({type(error).__name__}): {error}") from error
