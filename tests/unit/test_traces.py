"""Readers of traces: mapping of blocks, times and agents; what is wrong in a file is said with its place."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import limits
from kvstore.errors import TraceError
from kvstore.keys import KEY_BYTES
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.scenario import Arrivals, Workload
from kvstore.schedule.deployment import CacheSize, Cluster
from kvstore.simulate.cache import ClusterCache
from kvstore.workload.block_keys import KeySpace, keys_of_ids
from kvstore.workload.sources import requests_of
from kvstore.workload.traces import agentic as agentic_module
from kvstore.workload.traces import bundled, mooncake, read_agentic, read_mooncake
from kvstore.workload.traces import chain as chain_module

TRACES = Path(__file__).parents[3] / "shared" / "traces"


def line(at_ms: float = 0, tokens: int = 600, output: int = 5, ids: Any = (0, 1), **others: Any) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": tokens, "output_length": output, "hash_ids": list(ids), **others}


def trace_of(path: Path, *rows: dict[str, Any] | str) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def shared_tokens(one: bytes, two: bytes, block_tokens: int) -> int:
    pairs = zip(range(0, len(one), KEY_BYTES), range(0, len(two), KEY_BYTES), strict=False)
    equal = [one[a : a + KEY_BYTES] == two[b : b + KEY_BYTES] for a, b in pairs]
    return (equal.index(False) if False in equal else len(equal)) * block_tokens


# Mooncake


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_requests_of_a_mooncake_trace(tmp_path: Path, name: str) -> None:
    path = trace_of(tmp_path / name, line(3000), line(4500, 1024, 0, (0, 2)), "")
    first, second = read_mooncake(path, 512)
    assert (first.at_s, second.at_s) == (0.0, 1.5)
    assert (first.call.prompt_tokens, first.call.output_tokens) == (600, 5)
    assert second.call.output_tokens == 1
    assert len(first.call.keys) == KEY_BYTES
    assert len(second.call.keys) == 2 * KEY_BYTES


@pytest.mark.parametrize("block_tokens", [16, 64, 512, 384, 1024, 1500])
def test_blocks_of_any_size_share_what_ids_share(tmp_path: Path, block_tokens: int) -> None:
    """Three whole ids in common: every boundary up to 1536 tokens, none behind."""
    ids = ([0, 1, 2, 3, 4], [0, 1, 2, 7, 8])
    path = trace_of(tmp_path / "t.jsonl", *(line(0, 2560, 1, each) for each in ids))
    one, two = (each.call.keys for each in read_mooncake(path, block_tokens))
    assert len(one) == 2560 // block_tokens * KEY_BYTES
    assert shared_tokens(one, two, block_tokens) == 1536 // block_tokens * block_tokens
    assert len({one[at : at + KEY_BYTES] for at in range(0, len(one), KEY_BYTES)}) == 2560 // block_tokens


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(1, 400), min_size=2, max_size=2),
    st.integers(0, 12),
)
def test_two_prompts_share_what_their_ids_do_and_no_key_means_two_things(
    id_tokens: int, block_tokens: int, lengths: list[int], common: int
) -> None:
    keys, ids = [], []
    for number, tokens in enumerate(lengths):
        count = -(-tokens // id_tokens)
        ids.append([*range(min(common, count)), *(1000 * (number + 1) + each for each in range(common, count))])
        values = np.array(ids[-1], np.uint64)
        keys.append(keys_of_ids(KeySpace.MOONCAKE, 0, values, id_tokens, tokens, block_tokens))
    for each, tokens in zip(keys, lengths, strict=True):
        assert len(_split(each)) == len(set(_split(each))) == tokens // block_tokens
    equal = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    both_reach = min(*lengths, equal * id_tokens)
    assert shared_tokens(*keys, block_tokens) == both_reach // block_tokens * block_tokens
    assert len({*_split(keys[0]), *_split(keys[1])}) == sum(map(len, map(_split, keys))) - both_reach // block_tokens


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def test_a_partial_block_has_keys_as_far_as_the_prompt_goes(tmp_path: Path) -> None:
    path = trace_of(tmp_path / "t.jsonl", line(0, 600), line(0, 700))
    one, two = (each.call.keys for each in read_mooncake(path, 64))
    assert (len(one), len(two)) == (600 // 64 * KEY_BYTES, 700 // 64 * KEY_BYTES)
    assert shared_tokens(one, two, 64) == 576


GOOD = line()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no request in it"),
        ([""], "no request in it"),
        ([GOOD, "", GOOD], "line 2: empty, and more follows"),
        ([GOOD, "{"], "line 2: not JSON"),
        (["[" * 100_000], "line 1: not JSON"),
        (["3"], "line 1: a JSON object is expected, not int"),
        ([GOOD, {}], "line 2: 'timestamp' must be a number"),
        ([line("soon")], "'timestamp' must be a number that is not negative, not 'soon'"),
        ([line(float("nan"))], "'timestamp'"),
        ([line(float("inf"))], "'timestamp'"),
        ([line(-1)], "'timestamp'"),
        ([line(True)], "'timestamp'"),
        ([line(10**400)], "'timestamp'"),
        ([line(5), line(4)], "line 2: timestamp 4 comes after 5; sort"),
        ([line(tokens=0)], "'input_length' must be a whole number from 1"),
        ([line(tokens=1 << 40)], "'input_length'"),
        ([line(tokens=600.5)], "'input_length'"),  # type: ignore[arg-type]
        ([line(output=-1)], "'output_length'"),
        ([line(ids=(0,))], "600 tokens have 2 blocks of 512, and there are 1 hash_ids; the prompt has a hole"),
        ([line(ids=(0, 1, 2))], "there are 3 hash_ids"),
        ([line(ids=(0, -1))], "'hash_ids' has -1"),
        ([line(ids=(0, 1.0))], "'hash_ids' has 1.0"),
        ([line(ids=(0, 1 << 63))], "below 2\\*\\*63"),
        ([{**GOOD, "hash_ids": None}], "'hash_ids' must be a list of block ids, not nothing"),
        ([line(ids=(0, 1)), line(ids=(2, 1))], "line 2: block 1 stands behind block 2, and behind block 0 before"),
        ([line(ids=(0, 1)), line(ids=(1, 0))], "line 2: block 1 stands behind nothing"),
        ([line(ids=(0, 0))], "block 0 stands behind block 0, and behind nothing"),
    ],
)
def test_a_broken_mooncake_trace_is_named_with_its_line(
    tmp_path: Path, rows: list[dict[str, Any] | str], message: str
) -> None:
    path = trace_of(tmp_path / "t.jsonl", *rows)
    with pytest.raises(TraceError, match=message) as raised:
        list(read_mooncake(path, 512))
    assert str(path) in str(raised.value)


def test_a_file_that_is_cut_or_no_gzip_is_an_error(tmp_path: Path) -> None:
    whole = trace_of(tmp_path / "t.jsonl.gz", *[line(0, 600, 5, (0, number + 1)) for number in range(200)])
    text = whole.read_bytes()
    for broken in (text[: len(text) // 2], text[:-4], b"no gzip at all", text[:200] + b"\0\xff" * 50 + text[300:]):
        whole.write_bytes(broken)
        with pytest.raises(TraceError, match=r"t\.jsonl\.gz, line \d+: the file is damaged|not JSON"):
            list(read_mooncake(whole, 512))
    with pytest.raises(TraceError, match="cannot be opened: No such file"):
        list(read_mooncake(tmp_path / "missing.jsonl", 512))
    with pytest.raises(TraceError, match="cannot be opened"):
        list(read_mooncake(tmp_path, 512))


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(TraceError, match="line 1: not JSON"):
        list(read_mooncake(tmp_path / "t.jsonl", 512))


def test_traces_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trace_of(tmp_path / "t.jsonl", GOOD, line(ids=(0, 2)), line(ids=(0, 3)))
    monkeypatch.setattr(mooncake, "TRACE_REQUESTS_MAX", 2)
    with pytest.raises(TraceError, match="line 3: a trace has at most 2 requests"):
        list(read_mooncake(path, 512))
    monkeypatch.setattr(chain_module, "TRACE_IDS_MAX", 2)
    with pytest.raises(TraceError, match="line 2: more than 2 different block ids"):
        list(read_mooncake(path, 512))
    monkeypatch.setattr(mooncake, "TRACE_LINE_BYTES_MAX", 50)
    with pytest.raises(TraceError, match="line 1: longer than 50 bytes"):
        list(read_mooncake(path, 512))


def test_a_trace_is_read_as_it_is_taken(tmp_path: Path) -> None:
    path = trace_of(tmp_path / "t.jsonl", GOOD, "garbage")
    calls = read_mooncake(path, 512)
    assert next(calls).call.prompt_tokens == 600
    with pytest.raises(TraceError):
        next(calls)


# Agentic


def call(at_s: float, tokens: int = 130, output: int = 5, ids: Any = (1, 2), **others: Any) -> dict[str, Any]:
    return {"t": at_s, "type": "n", "in": tokens, "out": output, "hash_ids": list(ids), **others}


def session(*requests: Any, **others: Any) -> dict[str, Any]:
    return {"id": "one", "block_size": 64, "hash_id_scope": "local", "requests": list(requests), **others}


def session_file(path: Path, content: Any) -> Path:
    text = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_calls_wait_for_what_ended_last(tmp_path: Path) -> None:
    path = session_file(
        tmp_path / "a.json",
        session(
            call(10.0, api_time=5.0),
            call(20.0, 200, ids=(1, 2, 3), ttft=2.0),  # waits 5 s for the first; nothing says how long it took but ttft
            call(30.0, 260, ids=(1, 2, 3, 4), api_time=10.0),
            call(32.0, 70, ids=(9,), api_time=1.0),  # while the third runs: waits for the second, too
            call(45.0, 260, output=0, ids=(1, 2, 3, 4)),
        ),
    )
    [calls] = read_agentic(path, 64)
    assert [each.after for each in calls] == [None, 0, 1, 1, 2]
    assert [each.wait_s for each in calls] == [0.0, 5.0, 8.0, 10.0, 5.0]
    assert [len(each.keys) // KEY_BYTES for each in calls] == [2, 3, 4, 1, 4]
    assert calls[1].keys.startswith(calls[0].keys)
    assert calls[4].output_tokens == 1


def test_an_agent_goes_on_when_the_agents_that_it_called_have_ended(tmp_path: Path) -> None:
    inner = {"t": 2.0, "type": "subagent", "requests": [call(0.0, ids=(30, 31), api_time=1.0)]}
    outer = {"t": 10.0, "type": "subagent", "requests": [call(0.0, ids=(20, 21), api_time=2.0), inner]}
    path = session_file(tmp_path / "a.json", session(call(0.0, api_time=8.0), outer, call(20.0, ids=(1, 2))))
    [calls] = read_agentic(path, 64)
    assert [each.after for each in calls] == [None, 0, 1, 2]
    assert [each.wait_s for each in calls] == [0.0, 2.0, 0.0, 7.0]


def test_ids_of_two_sessions_never_meet(tmp_path: Path) -> None:
    for name in ("a.json", "b.json.gz"):
        session_file(tmp_path / name, session(call(0.0)))
    (tmp_path / "LICENSE").write_text("not a session")
    (one,), (two,) = read_agentic(tmp_path, 64)
    assert shared_tokens(one.keys, two.keys, 64) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[]", "a JSON object is expected, not list"),
        (session(), "no request in it"),
        (session(hash_id_scope="global"), "'hash_id_scope' must be 'local', not 'global'"),
        (session(call(0), block_size=0), "'block_size'"),
        ({**session(), "requests": {}}, "'requests' must be a list"),
        (session(call(0), 7), "request 2: a JSON object is expected"),
        (session(call(5), call(4)), "request 2: t=4 comes after 5"),
        (session(call(0, ids=(1,))), "130 tokens have 2 whole blocks of 64, and there are 1 hash_ids"),
        (session(call(0, ids=(1, 2, 3, 4))), "the prompt has a hole"),
        (session(call(0), call(1, ids=(3, 2))), "request 2: block 2 stands behind block 3"),
        (session(call(0, api_time=-1)), "'api_time'"),
        (session(call(0, api_time=None)), "'api_time'"),
        (session({"t": 0, "type": "subagent"}), "request 1: 'requests' must be a list"),
        (session({"t": 0, "type": "subagent", "requests": [{}]}), "request 1, request 1: 't' must be a number"),
    ],
)
def test_a_broken_session_is_named_with_its_request(tmp_path: Path, content: Any, message: str) -> None:
    path = session_file(tmp_path / "a.json", content)
    with pytest.raises(TraceError, match=message) as raised:
        list(read_agentic(path, 64))
    assert str(path) in str(raised.value)


def test_agents_that_nest_too_deeply_are_an_error(tmp_path: Path) -> None:
    inner: dict[str, Any] = call(0.0)
    for _ in range(limits.TRACE_DEPTH_MAX + 1):
        inner = {"t": 0.0, "type": "subagent", "requests": [inner]}
    with pytest.raises(TraceError, match="nested deeper than 8"):
        list(read_agentic(session_file(tmp_path / "a.json", session(inner)), 64))


def test_sessions_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = session_file(tmp_path / "a.json", session(call(0.0), call(1.0)))
    monkeypatch.setattr(agentic_module, "SESSION_CALLS_MAX", 1)
    with pytest.raises(TraceError, match="at most 1 calls"):
        list(read_agentic(path, 64))
    monkeypatch.setattr(agentic_module, "TRACE_SESSION_BYTES_MAX", 100)
    with pytest.raises(TraceError, match="more than 100 bytes"):
        list(read_agentic(path, 64))
    with pytest.raises(TraceError, match="no session in it"):
        list(read_agentic(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty", 64))
    with pytest.raises(TraceError, match="cannot be opened"):
        list(read_agentic(tmp_path / "missing", 64))


# As workloads


def test_the_excerpts_ship_with_their_licences() -> None:
    for kind in ("mooncake", "agentic"):
        path = bundled(kind)  # type: ignore[arg-type]
        folder = path if path.is_dir() else path.parent
        assert "Apache License" in (folder / "LICENSE-APACHE").read_text()
    assert "Mooncake" in (bundled("agentic").parent / "NOTICE.md").read_text()


def test_a_plain_clone_has_requests() -> None:
    requests = list(requests_of(Workload("mooncake"), block_tokens=512, seed=0))
    assert len(requests) == 1000
    assert requests[-1].arrival_s == 330.0
    assert all(one.arrival_s <= two.arrival_s for one, two in pairwise(requests))
    calls = list(requests_of(Workload("agentic"), block_tokens=512, seed=0))
    assert len(calls) == 159
    assert sum(each.after is None for each in calls) == 7


def test_a_trace_is_scaled_to_a_rate_over_what_is_taken() -> None:
    own = list(requests_of(Workload("mooncake", requests_max=500), block_tokens=512, seed=0))
    workload = Workload("mooncake", arrivals=Arrivals("trace", 10.0), requests_max=500)
    scaled = list(requests_of(workload, block_tokens=512, seed=0))
    assert 499 / scaled[-1].arrival_s == pytest.approx(10.0)
    ratios = {round(b.arrival_s / a.arrival_s, 9) for a, b in zip(own, scaled, strict=True) if a.arrival_s}
    assert len(ratios) == 1
    poisson = list(requests_of(Workload("mooncake", arrivals=Arrivals("poisson", 10.0)), block_tokens=512, seed=0))
    assert [each.keys for each in poisson[:500]] == [each.keys for each in own]
    assert 1000 / poisson[-1].arrival_s == pytest.approx(10.0, rel=0.1)


def test_a_trace_that_comes_at_once_cannot_be_scaled(tmp_path: Path) -> None:
    path = trace_of(tmp_path / "t.jsonl", GOOD, GOOD)
    workload = Workload("mooncake", str(path), arrivals=Arrivals("trace", 1.0))
    with pytest.raises(TraceError, match="come at once"):
        list(requests_of(workload, block_tokens=512, seed=0))


def test_sessions_begin_at_a_rate_that_gives_the_calls() -> None:
    requests = list(requests_of(Workload("agentic", arrivals=Arrivals("trace", 2.0)), block_tokens=512, seed=0))
    begins = [each.arrival_s for each in requests if each.after is None]
    assert begins == pytest.approx([number * 159 / 7 / 2.0 for number in range(7)])
    # An agent that runs while others begin comes between them.
    assert [each.number for each in requests] == list(range(159))


def hit_share(path: Path | None, block_tokens: int = 512) -> float:
    """Tokens that an unbounded cache of a dense model would save, of all."""
    curve = PolynomialCurve((0.1, 0.1), 1000.0)
    profile = Profile("dense", "made up", curve, KvSize(0.0, 1.0), curve, 8, 1, 1 << 20)
    cache = ClusterCache(Cluster("all", profile, 1, 1, cache=CacheSize(1e18)), block_tokens)
    workload = Workload("mooncake", None if path is None else str(path))
    for each in requests_of(workload, block_tokens=block_tokens, seed=0):
        found = cache.find(each)
        cache.used(each, found)
        cache.store(each, keys=each.keys, tokens=each.prompt_tokens, resume_tokens=found.resume_tokens)
    counts = cache.counts()[0]
    return counts.hit_tokens / counts.asked_tokens


def test_the_excerpt_hits_as_it_does() -> None:
    """Pinned, so that a change of the mapping is noticed; smaller blocks only ever find more."""
    coarse, fine = hit_share(None), hit_share(None, 64)
    assert coarse == pytest.approx(0.2155, abs=5e-4)
    assert coarse <= fine


def test_the_conversation_trace_hits_as_published() -> None:
    """37.4 % of the tokens lie in blocks that came before.

    One token of each prompt is computed in any case, hence the last block of a prompt that came whole before.
    """
    path = TRACES / "mooncake" / "conversation_trace.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the whole trace is not here: {path}")
    seen: set[int] = set()
    hits = total = 0
    with gzip.open(path) as lines:
        rows = [json.loads(text) for text in lines]
    for row in rows:
        known = next((n for n, block in enumerate(row["hash_ids"]) if block not in seen), len(row["hash_ids"]))
        hits += min(known * 512, row["input_length"])
        total += row["input_length"]
        seen.update(row["hash_ids"])
    assert round(hits / total, 3) == 0.374
    ours = hit_share(path)
    assert hits / total - 5e-4 < ours <= hits / total
