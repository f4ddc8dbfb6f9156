"""Which vLLM the adapter was tested with. Its connector interface says of itself that it may change."""

from __future__ import annotations

from kvstore.errors import UnavailableError

TESTED_VERSIONS = ("0.32.0",)
"""Those that `make test-engines` runs."""


def check_version(version: str, *, allow_untested: bool) -> str:
    """Refuse a vLLM that nobody has tested the adapter with.

    Args:
        version: of the vLLM that is imported; what follows a `+` names a build, and does not count.
        allow_untested: `allow_untested_version` of the connector's settings.

    Returns:
        A warning for the log; empty for a tested version.

    Raises:
        UnavailableError: an untested version that is not allowed.
    """
    if version.partition("+")[0] in TESTED_VERSIONS:
        return ""
    tested = ", ".join(TESTED_VERSIONS)
    risk = (
        "its connector interface, cache layouts and scheduler may differ, so that the engine fails later, or what is "
        "loaded is silently wrong"
    )
    if allow_untested:
        return f"vLLM {version} was not tested with this connector (tested: {tested}), and is allowed to run: {risk}"
    raise UnavailableError(
        f"vLLM {version} was not tested with this connector (tested: {tested}): {risk}. Install a tested version; or, "
        "after comparing outputs with and without the connector, set allow_untested_version to true in "
        "kv_connector_extra_config"
    )
