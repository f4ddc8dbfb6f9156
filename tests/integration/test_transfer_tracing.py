"""A span per transfer, seen by OpenTelemetry's own exporter."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore.errors import PeerGoneError
from kvstore.testing.resources import leaves_nothing
from tests.integration.transfer_nodes import WITHIN_S, address, match_all, prompt, store_prompt, tiny_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = prompt(32)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    reason = "opentelemetry-sdk is not installed"
    trace = pytest.importorskip("opentelemetry.trace", reason=reason)
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=reason)
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=reason)
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=reason)
    provider = sdk.TracerProvider()
    exporter = memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    # The global provider may be set once per process only; other tests do not want this one.
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def test_a_transfer_is_a_span_below_its_callers(exporter: Any) -> None:
    from opentelemetry import trace

    with (
        leaves_nothing(),
        kvstore.open(tiny_spec(), dram="8MiB") as source,
        kvstore.open(tiny_spec(), dram="8MiB") as target,
        target.listen(address("tcp")) as endpoint,
    ):
        store_prompt(source, IDS)
        with trace.get_tracer("caller").start_as_current_span("request") as request:
            handle = source.send(match_all(source, IDS), endpoint.address)
        report = handle.result(WITHIN_S)
    (span,) = [span for span in exporter.get_finished_spans() if span.name == "kvstore.transfer"]
    assert span.parent.span_id == request.get_span_context().span_id
    told = span.attributes
    assert told["kvstore.transfer.id"] == str(report.transfer)
    assert told["server.address"] == endpoint.address
    assert told["kvstore.transfer.outcome"] == "committed"
    assert told["kvstore.transfer.bytes"] == report.total_bytes
    assert told["kvstore.transfer.pieces"] == report.pieces
    assert told["kvstore.transfer.connections"] == 1
    assert told["kvstore.transfer.path"] == report.path.why
    assert span.status.is_unset


def test_a_failure_is_in_its_span(exporter: Any) -> None:
    with kvstore.open(tiny_spec(), dram="8MiB") as source:
        store_prompt(source, IDS)
        with pytest.raises(PeerGoneError):
            source.send(match_all(source, IDS), "tcp://127.0.0.1:1").result(WITHIN_S)
    (span,) = exporter.get_finished_spans()
    assert span.attributes["kvstore.transfer.outcome"] == "PeerGoneError"
    assert not span.status.is_ok
    assert span.events[0].name == "exception"


@pytest.mark.parametrize("when", ["begin", "end"])
def test_a_tracer_that_raises_does_not_harm_a_transfer(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Span:
        def set_attributes(self, attributes: object) -> None:
            raise OSError("no tracing")

        set_attribute = set_attributes

    class Tracer:
        def start_span(self, name: str, **_: object) -> Span:
            if when == "begin":
                raise OSError("no tracing")
            return Span()

    trace = types.SimpleNamespace(
        get_tracer=lambda name: Tracer(),
        SpanKind=types.SimpleNamespace(PRODUCER=4),
        StatusCode=types.SimpleNamespace(ERROR=2),
        Status=None,
    )
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)  # type: ignore[misc]
    with (
        leaves_nothing(),
        kvstore.open(tiny_spec(), dram="8MiB") as source,
        kvstore.open(tiny_spec(), dram="8MiB") as target,
        target.listen(address("tcp")) as endpoint,
    ):
        store_prompt(source, IDS)
        assert source.send(match_all(source, IDS), endpoint.address).result(WITHIN_S).tokens == len(IDS)
        with pytest.raises(PeerGoneError):
            source.send(match_all(source, IDS), "tcp://127.0.0.1:1").result(WITHIN_S)


def test_transfers_do_not_import_opentelemetry() -> None:
    code = "import sys, kvstore.transfer.sender, kvstore.transfer.tracing as t; "
    code += "assert isinstance(t.begin_span(None, '', 0, 0), t.NoSpan); assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WITHIN_S)
