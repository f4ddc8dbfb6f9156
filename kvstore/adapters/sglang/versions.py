"""Which SGLang this adapter was tested with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from kvstore.errors import UnavailableError

TESTED = ("0.5.23",)
"""Releases; their post releases count as the same."""
OVERRIDE = "allow_untested_version"


def installed_version() -> str:
    """Of SGLang in this environment.

    Raises:
        UnavailableError: there is none.
    """
    try:
        return version("sglang")
    except PackageNotFoundError as error:
        raise UnavailableError(f"SGLang is not installed ({error}); pip install sglang=={TESTED[-1]}") from error


def check_version(found: str, *, allow_untested: bool) -> str:
    """The version, if the adapter may run with it.

    Raises:
        UnavailableError: it was not tested with this one, and nobody said that it may run all the same.
    """
    release = re.sub(r"(\.post\d+)?(\+.*)?$", "", found)
    if release not in TESTED and not allow_untested:
        raise UnavailableError(
            f"the SGLang adapter was tested with {', '.join(TESTED)}, found {found}; install a tested one, or set "
            f'"{OVERRIDE}": true among the backend\'s settings: what no longer fits may fail later, or load wrong bytes'
        )
    return found
