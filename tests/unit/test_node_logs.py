"""Log lines: one per event, in either form, whatever is in them."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cluster import LogConfig, configure_logging
from kvstore.cluster.logs import log_event

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG = logging.getLogger("kvstore.test")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("kvstore")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def lines(form: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(LogConfig(form, level), stream)
    return stream


def test_text() -> None:
    stream = lines("text")
    log_event(LOG, logging.INFO, "listening", "transfers may come", address="tcp://127.0.0.1:1", model="a b")
    LOG.debug("not shown")
    (line,) = stream.getvalue().splitlines()
    stamp, _, rest = line.partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert rest == 'info kvstore.test: transfers may come event=listening address=tcp://127.0.0.1:1 model="a b"'


def test_json() -> None:
    stream = lines("json", "debug")
    log_event(LOG, logging.WARNING, "cut", "given up", transfers=3, time="never")
    LOG.debug("%d of %d", 1, 2)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert list(first) == ["time", "level", "logger", "message", "event", "transfers"]
    assert (first["level"], first["event"], first["transfers"]) == ("warning", "cut", 3)
    assert (second["logger"], second["message"]) == ("kvstore.test", "1 of 2")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_stays_in_its_line(form: str) -> None:
    stream = lines(form)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        LOG.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert "Traceback" in line
    assert "ValueError" in line


@pytest.mark.parametrize("form", ["text", "json"])
@given(words=st.text())
def test_a_peers_words_begin_no_line(form: str, words: str) -> None:
    stream = lines(form)
    log_event(LOG, logging.INFO, "transfer_aborted", f"the sender said {words}", reason=words)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    if form == "json":
        assert json.loads(text)["reason"] == words


def test_configuring_again_replaces() -> None:
    first, second = lines("text"), lines("json")
    LOG.info("once")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1
