"""What a node tells over HTTP: alive, ready, metrics, status."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from kvstore.cluster.http import Response
from kvstore.cluster.metrics import metrics_text
from kvstore.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.cluster.snapshot import NodeSnapshot


def health_routes(state: Callable[[], str], snapshot: Callable[[], NodeSnapshot]) -> dict[str, Callable[[], Response]]:
    """The answers by path. `/healthz` and `/readyz` take no lock of the pool."""

    def healthz() -> Response:
        return Response(HTTPStatus.OK, b"alive\n")

    def readyz() -> Response:
        now = state()
        return Response(HTTPStatus.OK if now == "ready" else HTTPStatus.SERVICE_UNAVAILABLE, f"{now}\n".encode())

    def metrics() -> Response:
        try:
            body, content_type = metrics_text(snapshot())
        except UnavailableError as error:
            return Response(HTTPStatus.NOT_IMPLEMENTED, f"{error}\n".encode())
        return Response(HTTPStatus.OK, body, content_type)

    def status() -> Response:
        return Response(HTTPStatus.OK, json.dumps(snapshot().document(), indent=2).encode() + b"\n", "application/json")

    return {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics, "/status": status}
