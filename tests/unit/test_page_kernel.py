"""The Triton kernel compiled for GPUs, without one: its compiler brings all that is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed; `make test-triton` brings it", allow_module_level=True)

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90, 100)
REGISTERS_MAX = 255
"""Of a thread. What needs more keeps values in memory instead."""

PROGRAM = """
import json, os, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstore.tiers.gpu.gather_triton import TILE_WIDTH_MAX, TILE_WORDS, move_words

TABLES = ("bases", "layer_offsets", "run_offsets", "place_offsets")
WORDS = {1: (tl.uint8, "*u8"), 2: (tl.int16, "*i16"), 4: (tl.int32, "*i32"), 8: (tl.int64, "*i64")}

def compiled(capability, word_bytes, is_packing, width, ones=(), wide=()):
    word, pointer = WORDS[word_bytes]
    height = TILE_WORDS // width
    constants = {"WORD": word, "TILE_PLACES": height, "TILE_WIDTH": width, "IS_PACKING": is_packing}
    constants.update(dict.fromkeys(ones, 1))  # arguments that are 1 are constants to Triton
    types = {name: "constexpr" for name in constants}
    signature = {
        name: types.get(name)
        or (pointer if name == "packed" else "*i64" if name in TABLES else "i64" if name in wide else "i32")
        for name in move_words.arg_names
    }
    source = ASTSource(fn=move_words, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))

def usage(kernel):
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:(\\d+) LOCAL:(\\d+)", told.stdout + told.stderr)
    return [int(number) for number in found.groups()]

ALL = ("layers", "rows", "places", "tiles", "row_words", "run_words")
for capability in json.loads(sys.argv[1]):
    cases = [(word_bytes, is_packing, 32, (), ()) for word_bytes in WORDS for is_packing in (True, False)]
    cases += [(8, True, width, (), ()) for width in (1, TILE_WIDTH_MAX)]
    cases += [(8, True, 1, ALL, ()), (8, False, 32, (), ("row_stride", "image_words"))]
    for case in cases:
        kernel = compiled(capability, *case)
        print(json.dumps([capability, case[0], case[1], case[2], usage(kernel), "ld.global" in kernel.asm["ptx"]]))
"""


def test_the_kernel_compiles_and_keeps_its_values_in_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CAPABILITIES)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=110,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows: list[Any] = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {row[0] for row in rows} == set(CAPABILITIES)
    assert {row[1] for row in rows} == {1, 2, 4, 8}
    for capability, word_bytes, is_packing, width, (registers, stack, _, local), does_load in rows:
        what = f"sm_{capability}, words of {word_bytes}, packing: {is_packing}, width {width}"
        assert (stack, local) == (0, 0), f"{what}: values that did not fit into registers"
        assert 0 < registers <= REGISTERS_MAX, what
        assert does_load, what
