"""Settings that an engine passes on to an adapter as a table: checked by kind, as values of frozen dataclasses."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore.cluster.kinds import Kind, parse_as, shown
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_Settings = TypeVar("_Settings")


def read_settings(kind: type[_Settings], given: Mapping[str, Any], origin: str, example: str) -> _Settings:
    """Settings of a dataclass that needs `weights`, from what an engine passes on.

    Args:
        origin: names where they stand, in errors.
        example: how the weights are named there.

    Raises:
        ConfigError: an unknown key, a missing one, or as the constructor.
    """
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"{origin} has {', '.join(map(str, unknown))}; known are {', '.join(sorted(known))}")
    if "weights" not in given:
        raise ConfigError(
            f"{origin} has no weights; name the checkpoint, for example by the digest of its files: {example}. Two "
            "models under one name would read each other's cache"
        )
    return kind(**given)


def check_kinds(settings: Any, kinds: Mapping[str, Kind], origin: str) -> None:
    """Replace each member of a frozen dataclass by the value that its kind makes of it; for `__post_init__`.

    Raises:
        ConfigError: a value is of another kind.
    """
    for each in fields(settings):
        value = getattr(settings, each.name)
        if not (value is None and each.default is None):
            object.__setattr__(settings, each.name, parse_as(kinds[each.name], each.name, value, origin))


def check_owner(settings: Any, names: Iterable[str], kinds: Mapping[str, Kind], origin: str) -> None:
    """Refuse settings of a store's owner beside the `socket` of another one; after `check_kinds`.

    Args:
        names: of the settings that are an owner's.

    Raises:
        ConfigError: one of them is not the default.
    """
    if not settings.socket:
        return
    defaults = {each.name: each.default for each in fields(settings)}

    def is_default(name: str) -> bool:
        default: Any = defaults[name]
        return bool(getattr(settings, name) == (None if default is None else kinds[name].parse(default)))

    told = [name for name in names if not is_default(name)]
    if told:
        raise ConfigError(
            f"{origin}: socket = {shown(settings.socket)} is another process's store, so {', '.join(told)} cannot be "
            "set here; set them where that store is opened, or leave the socket out"
        )
