"""A model spec as a file, so that programs of one model agree on it (docs/model-spec.md, "As a file")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.documents import read_document, without_repeats
from kvstore.errors import SpecError
from kvstore.limits import SPEC_FILE_BYTES_MAX
from kvstore.spec.model import ModelSpec

if TYPE_CHECKING:
    import os

FORMAT = "kvstore.model-spec"
VERSION = 1
_KEYS = ("format", "version", "fingerprint", "spec")


def spec_to_file_text(spec: ModelSpec) -> str:
    """What a file says about a spec: JSON, with its fingerprint so that a change is noticed."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": spec.fingerprint.hex(),
        "spec": json.loads(spec.to_json()),
    }
    return json.dumps(document, indent=2) + "\n"


def spec_from_file_text(text: str, name: str = "the spec file") -> ModelSpec:
    """The spec that `spec_to_file_text` wrote. A fingerprint is checked; a hand-written file may leave it out.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        SpecError: another format or version, a name that this version does not know, values that make no spec, or a
            fingerprint that is not that of the spec.
    """
    try:
        document = json.loads(
            text, object_pairs_hook=without_repeats, parse_constant=_no_constant, parse_float=_no_fraction
        )
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{name} is not a model spec in JSON: {error}; write one with `kvstore spec`") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SpecError(f'{name} has no "format": "{FORMAT}"; write one with `kvstore spec`')
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise SpecError(f"{name} is of version {version!r}; this release reads version {VERSION}")
    unknown = sorted(set(document) - set(_KEYS))
    if unknown or "spec" not in document:
        what = f"has the unknown entry {unknown[0]!r}" if unknown else "has no entry 'spec'"
        raise SpecError(f"{name} {what}; known are {', '.join(_KEYS)}")
    spec = _spec(document["spec"], name)
    if "fingerprint" in document and document["fingerprint"] != spec.fingerprint.hex():
        raise SpecError(
            f"{name} says fingerprint {document['fingerprint']!r}, its spec has {spec.fingerprint.hex()}: it was "
            "changed; if that was meant, remove the line"
        )
    return spec


def save_spec(spec: ModelSpec, path: str | os.PathLike[str]) -> None:
    """Write a spec to a file; `load_spec` reads it back."""
    Path(path).write_text(spec_to_file_text(spec), encoding="ascii")


def load_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """Read a spec from a file.

    Raises:
        SpecError: it cannot be read, is larger than 16 MiB, or is no spec; the message names the file.
    """
    data = read_document(path, SPEC_FILE_BYTES_MAX, "spec file", SpecError)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not text: {error}; write a spec file with `kvstore spec`") from error
    return spec_from_file_text(text, str(path))


def _spec(body: Any, name: str) -> ModelSpec:
    text = _canonical(body)
    try:
        spec = ModelSpec.from_json(text)
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from error
    # What the reader overlooked or took for something else would be missing from the fingerprint.
    if spec.to_json() != text:
        raise SpecError(
            f"{name} says something about the spec that this release does not know, or writes a value in another type; "
            "compare it with what `kvstore spec` writes"
        )
    return spec


def _canonical(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _no_fraction(number: str) -> Any:
    raise ValueError(f"{number} is no whole number, and a spec has no others")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
