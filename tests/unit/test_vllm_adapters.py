"""LoRA adapters: whose files are replaced while they are served is cached by no name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from kvstore.adapters.paged import NotCached, RequestIdentity
from kvstore.adapters.vllm.requests import Identities
from tests.vllm_requests import FakeRequest

if TYPE_CHECKING:
    from pathlib import Path


def request_of(folder: Path, number: int = 1) -> FakeRequest:
    lora = SimpleNamespace(lora_int_id=number, lora_name="tuned", lora_path=str(folder))
    return FakeRequest("a", [1, 2, 3], lora_request=lora)


def write(folder: Path, weights: bytes) -> None:
    """As tools do: a new file takes the old one's name."""
    folder.mkdir(exist_ok=True)
    (folder / "new").write_bytes(weights)
    (folder / "new").rename(folder / "adapter_model.safetensors")


def test_replaced_files_are_not_cached_until_the_adapter_is_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    write(folder, b"one")
    identities = Identities()
    first = identities.of(request_of(folder))
    assert isinstance(first, RequestIdentity)
    assert identities.of(request_of(folder)) == first
    write(folder, b"two")  # the engine goes on with what it has read, or reads it again when it had let it go
    assert isinstance(identities.of(request_of(folder)), NotCached)
    again = identities.of(request_of(folder, number=2))
    assert isinstance(again, RequestIdentity)
    assert again.adapter != first.adapter


def test_the_same_files_elsewhere_are_the_same_adapter(tmp_path: Path) -> None:
    found = []
    for name in ("here", "there"):
        write(tmp_path / name, b"one")
        found.append(Identities().of(request_of(tmp_path / name)))
    assert isinstance(found[0], RequestIdentity)
    assert found[0] == found[1]
