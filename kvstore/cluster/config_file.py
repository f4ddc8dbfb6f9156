"""A node's configuration from a TOML file, and from flags that override it."""

from __future__ import annotations

import difflib
import tomllib
from typing import TYPE_CHECKING, Any

from kvstore.cluster.config import SECTIONS, SETTINGS, NodeConfig
from kvstore.cluster.kinds import parse_as, shown
from kvstore.documents import read_document
from kvstore.errors import ConfigError
from kvstore.limits import NODE_CONFIG_BYTES_MAX

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

TLS_TABLE = "tls"
"""Reserved for encryption and authentication."""


def read_config(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, object] | None = None
) -> NodeConfig:
    """The configuration in a TOML file, with some of its keys overridden.

    Args:
        path: of the file; None for none.
        overrides: values by key, `{"transfer.credit_bytes": "32MiB"}`; they win over the file.

    Raises:
        ConfigError: the file cannot be read, or something in it cannot be used; the message names file and key.
    """
    values: dict[str, tuple[object, str]] = {}
    if path is not None:
        values.update({key: (value, str(path)) for key, value in _flat(_read_toml(path), str(path))})
    values.update({key: (value, "command line") for key, value in (overrides or {}).items()})
    parsed = {key: _parse_setting(key, value, origin) for key, (value, origin) in values.items()}
    if "spec" not in parsed:
        where = f"{path} has no `spec`" if path is not None else "no spec file is named"
        raise ConfigError(f'{where}; make one with `kvstore spec`, and name it with --spec FILE or spec = "FILE"')
    sections: dict[str, Any] = {
        name: section(**{key.partition(".")[2]: parsed[key] for key in parsed if key.startswith(f"{name}.")})
        for name, section in SECTIONS.items()
    }
    plain: dict[str, Any] = {key: value for key, value in parsed.items() if "." not in key}
    return NodeConfig(**plain, **sections)


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    data = read_document(path, NODE_CONFIG_BYTES_MAX, "configuration", ConfigError)
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error


def _flat(document: Mapping[str, Any], path: str) -> Iterable[tuple[str, object]]:
    """Keys and values, those of a known table by their full names."""
    for name, value in document.items():
        if name not in SECTIONS:
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            raise ConfigError(f"{path}: {name} is a table; write [{name}] and its settings below")


def _parse_setting(key: str, value: object, origin: str) -> object:
    if key.partition(".")[0] == TLS_TABLE:
        raise ConfigError(
            f"{origin}: {TLS_TABLE} is not there yet: this version neither encrypts nor authenticates; leave it out, "
            "and listen on loopback or on a network that you trust"
        )
    setting = SETTINGS.get(key)
    if setting is None:
        near = difflib.get_close_matches(key, SETTINGS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SETTINGS)}"
        raise ConfigError(f"{origin}: there is no setting {shown(key)}; {hint}")
    return parse_as(setting.kind, key, value, origin)
