"""The examples of docs/extending.md run as they stand there, each against its kit, and are found as a package's are."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvstore import registry
from kvstore.store import open_store
from kvstore.testing.specs import check_lease, hybrid, put_all

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
EXAMPLES: dict[str, Any] = {"__name__": __name__}
for language, code in BLOCKS:
    if language == "python":
        exec(compile(code, str(PAGE), "exec"), EXAMPLES)

# pytest collects what is named here like any other test of this module.
globals().update({name: thing for name, thing in EXAMPLES.items() if name.lower().startswith("test")})

WITHIN_S = 30.0


def test_every_seam_has_an_example_and_its_kit() -> None:
    kits = {base.__name__ for name, thing in EXAMPLES.items() if name.startswith("Test") for base in thing.__bases__}
    assert kits == {
        "TransportConformance",
        "CodecConformance",
        "TierConformance",
        "EvictionConformance",
        "CheckpointConformance",
        "RoutingConformance",
    }


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's entry points, as if its package were installed."""
    module = types.ModuleType("my_package")
    vars(module).update(EXAMPLES)
    monkeypatch.setitem(sys.modules, "my_package", module)
    (page_toml,) = (code for language, code in BLOCKS if language == "toml")
    groups = tomllib.loads(page_toml)["project"]["entry-points"]

    def entry_points(*, group: str) -> metadata.EntryPoints:
        found = groups.get(group, {}).items()
        return metadata.EntryPoints(metadata.EntryPoint(name, value, group) for name, value in found)

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    registry.forget()
    yield
    monkeypatch.undo()
    registry.forget()


@pytest.mark.usefixtures("installed")
def test_a_prefix_crosses_by_the_transport_of_the_page(tmp_path: Path) -> None:
    spec, ids = hybrid(16), list(range(40))
    address = f"unix://{tmp_path}/a.sock"
    with open_store(spec, dram="1MiB") as near, open_store(spec, dram="1MiB") as far:
        prompt = near.prompt(ids)
        with near.write(prompt) as writer:
            put_all(writer)
            writer.commit()
        far.listen(address)
        report = near.send(near.match([*ids, 1]), address).result(WITHIN_S)
        assert report.is_native
        with far.read(far.match([*ids, 1]), verify=True) as lease:
            check_lease(lease, prompt)


@pytest.mark.usefixtures("installed")
def test_the_codec_of_the_page_is_found() -> None:
    assert registry.codec_for("zlib").name == "zlib"
