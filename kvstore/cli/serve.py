"""`kvstore serve`: a node as a process."""

from __future__ import annotations

import logging
import sys
import tomllib
from typing import TYPE_CHECKING

from kvstore.cluster import Node, configure_logging, read_config
from kvstore.cluster.logs import log_event
from kvstore.cluster.signals import StopSignals
from kvstore.cluster.supervisor import notify_supervisor
from kvstore.errors import ConfigError, KVStoreError, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LOG = logging.getLogger("kvstore.node")
EXIT_DRAINED = 0
EXIT_CUT = 1
EXIT_CONFIG = 2
"""As for wrong arguments: starting again changes nothing."""
EXIT_START = 3
"""A port in use, too little memory: starting again may help."""


def run_serve(config_file: Path | None, overrides: Mapping[str, object], assignments: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    Args:
        config_file: TOML.
        overrides: settings by key that win over the file; None means not given.
        assignments: `key=value`, which win over both.
    """
    try:
        given = {key: value for key, value in overrides.items() if value is not None}
        config = read_config(config_file, {**given, **dict(map(parse_assignment, assignments))})
    except ConfigError as error:
        print(f"kvstore serve: {error}", file=sys.stderr)
        return EXIT_CONFIG
    configure_logging(config.log)
    with StopSignals() as signals:
        try:
            node = Node(config)
        except KVStoreError as error:
            log_event(LOG, logging.ERROR, "failed", f"the node cannot start: {error}", error=type(error).__name__)
            return EXIT_CONFIG if isinstance(error, ConfigError | SpecError) else EXIT_START
        except Exception as error:
            # Nothing that anybody foresaw, such as a limit of the system: where it came from goes into the log, too.
            fields = {"event": "failed", "error": type(error).__name__}
            LOG.exception("the node cannot start: %s", error, extra={"fields": fields})
            return EXIT_START
        with node:
            return _serve(node, signals)


def _serve(node: Node, signals: StopSignals) -> int:
    notify_supervisor("READY=1")
    signals.wait()
    log_event(LOG, logging.INFO, "signal", "asked to stop; a second signal ends at once", signal=signals.last)
    notify_supervisor("STOPPING=1")
    return EXIT_DRAINED if node.drain(should_end=lambda: signals.count > 1) else EXIT_CUT


def parse_assignment(text: str) -> tuple[str, object]:
    """Key and value of `key=value`; the value is TOML, or else plain text.

    Raises:
        ConfigError: there is no `=`.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r} is not KEY=VALUE; write for example --set transfer.credit_bytes=32MiB")
    try:
        document = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key.strip(), value
    return key.strip(), document["value"] if len(document) == 1 else value
