"""Fields of a frozen dataclass that are computed when they are first looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    Value = TypeVar("Value", bound="LazyFields")


class LazyFields:
    """Base of a dataclass whose instances `lazily` may leave fields open. Any thread may look at them.

    Such fields have no default: a default would be found before they are computed.
    """

    @classmethod
    def lazily(cls: type[Value], makers: dict[str, Callable[[], Any]], **fields: Any) -> Value:
        """An instance with `fields`, whose other fields come from `makers`."""
        value = cls.__new__(cls)
        value.__dict__.update(fields, _makers=makers)
        return value

    if not TYPE_CHECKING:  # or every misspelt name would pass

        def __getattr__(self, name: str) -> Any:
            maker = self.__dict__.get("_makers", {}).get(name)
            if maker is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            # Two threads may both compute it: the values are equal.
            value = self.__dict__[name] = maker()
            return value
