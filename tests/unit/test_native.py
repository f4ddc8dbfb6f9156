"""The native module: every checksum path against the definition, and strided copies against NumPy."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import _native
from kvstore.limits import COPY_THREADS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

FEATURES = _native.cpu_features()
NEEDS = {
    "crc32c": {
        "portable": (),
        "sse42": ("sse42", "pclmul"),
        "avx512": ("avx512f", "vpclmulqdq", "sse42", "pclmul"),
    },
    "copy": {"portable": (), "avx2": ("avx2",), "avx512": ("avx512f",)},
}
"""What each path of each job needs of the CPU, from worst to best."""
VARIABLES = {"crc32c": "KVSTORE_CRC32C", "copy": "KVSTORE_COPY"}


def can_run(job: str, path: str) -> bool:
    return all(FEATURES[feature] for feature in NEEDS[job][path])


def skip_unless(job: str, path: str) -> None:
    missing = [feature for feature in NEEDS[job][path] if not FEATURES[feature]]
    if missing:
        pytest.skip(f"this CPU cannot run the {path} path of {job}: it has no {', '.join(missing)}")


def best_path(job: str) -> str:
    return [path for path in NEEDS[job] if can_run(job, path)][-1]


RFC_3720_VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
    (
        bytes.fromhex("01c000000000000000000000000000001400000000000400")
        + bytes.fromhex("000000140000001828000000000000000200000000000000"),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
    (b"", 0),
]

# Edges of the streams that the SSE4.2 path joins: 3 x 64, 3 x 512 and 3 x 4096 bytes.
EDGES = [0, 1, 7, 8, 9, 63, 64, 191, 192, 193, 383, 384, 1535, 1536, 1537, 12287, 12288, 12289, 12288 + 1536 + 192 + 15]
# Edges of folding: steps of 256 bytes, from 1024 on.
EDGES += [255, 256, 257, 1023, 1024, 1025, 1279, 1280, 1281]

# Printed as JSON by a process of its own, because a process chooses its path once.
CHECKSUMS_OF_CASES = """
import json, numpy as np
from kvstore import _native
random = np.random.default_rng(3720)
memory = random.integers(0, 256, 40_000, dtype=np.uint8).tobytes()
results = []
for size in {edges} + [int(n) for n in random.integers(0, 20_000, 40)]:
    skip, cut = int(random.integers(0, 64)), int(random.integers(0, size + 1))
    value = int(random.integers(0, 1 << 32))
    data = memoryview(memory)[skip : skip + size]
    whole = _native.crc32c(data, value)
    assert whole == _native.crc32c(data[cut:], _native.crc32c(data[:cut], value)), (size, skip, cut)
    results.append([skip, size, value, whole])
print(json.dumps([_native.cpu_features(), results]))
"""

PRINT_FEATURES = "from kvstore import _native; import json; print(json.dumps(_native.cpu_features()))"


def crc32c_by_definition(data: bytes, value: int = 0) -> int:
    """One byte at a time; the table is made from the polynomial, bit by bit."""
    state = value ^ 0xFFFFFFFF
    for byte in data:
        state = BYTE_STATES[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def _byte_state(state: int) -> int:
    for _ in range(8):
        state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state


BYTE_STATES = [_byte_state(byte) for byte in range(256)]


def run_python(code: str, **paths: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with paths forced by job."""
    forced = {VARIABLES[job]: path for job, path in paths.items()}
    environment = dict(os.environ, **forced, PYTHONPATH=os.pathsep.join(sys.path))
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def addresses_of(*arrays: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


class TestCrc32c:
    @pytest.mark.parametrize(("data", "expected"), RFC_3720_VECTORS)
    def test_rfc_3720_vectors(self, data: bytes, expected: int) -> None:
        assert _native.crc32c(data) == expected
        assert crc32c_by_definition(data) == expected

    @pytest.mark.parametrize("path", NEEDS["crc32c"])
    def test_each_path_follows_the_definition(self, path: str) -> None:
        skip_unless("crc32c", path)
        run = run_python(CHECKSUMS_OF_CASES.format(edges=EDGES), crc32c=path)
        assert run.returncode == 0, run.stderr
        features, results = json.loads(run.stdout)
        assert features["crc32c"] == path
        memory = np.random.default_rng(3720).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
        for skip, size, value, found in results:
            assert found == crc32c_by_definition(memory[skip : skip + size], value), (skip, size, value)

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(parts=st.lists(st.binary(max_size=700), max_size=5), value=st.integers(0, (1 << 32) - 1))
    def test_continues(self, parts: list[bytes], value: int) -> None:
        state = value
        for part in parts:
            state = _native.crc32c(part, state)
        assert state == crc32c_by_definition(b"".join(parts), value)

    def test_takes_any_buffer(self) -> None:
        data = np.arange(64, dtype=np.uint16).reshape(8, 8)
        expected = crc32c_by_definition(data.tobytes())
        read_only = data.copy()
        read_only.flags.writeable = False
        for buffer in (
            data,
            read_only,
            data.tobytes(),
            bytearray(data.tobytes()),
            memoryview(data.tobytes()),
            data.reshape(-1),
        ):
            assert _native.crc32c(buffer) == expected

    def test_refuses_what_has_no_contiguous_bytes(self) -> None:
        with pytest.raises(TypeError, match="bytes-like"):
            _native.crc32c("text")  # type: ignore[arg-type]
        with pytest.raises(BufferError, match="contiguous"):
            _native.crc32c(memoryview(b"abcdef")[::2])

    @pytest.mark.parametrize("value", [-1, 1 << 32, "1", None])
    def test_refuses_values_past_32_bits(self, value: object) -> None:
        with pytest.raises(TypeError, match="value"):
            _native.crc32c(b"abc", value)  # type: ignore[arg-type]


class TestCrc32cMany:
    def test_equals_single_checksums(self) -> None:
        random = np.random.default_rng(1)
        memory = random.integers(0, 256, 100_000, dtype=np.uint8)
        begins = random.integers(0, 50_000, 100)
        sizes = random.integers(0, 5_000, 100).astype(np.uint64)
        found = _native.crc32c_many(memory.ctypes.data + begins.astype(np.uint64), sizes)
        assert found.dtype == np.uint32
        assert found.shape == (100,)
        for begin, size, checksum in zip(begins, sizes, found, strict=True):
            assert checksum == _native.crc32c(memory[int(begin) : int(begin) + int(size)])

    def test_result_outlives_the_call(self) -> None:
        memory = np.arange(64, dtype=np.uint8)
        kept = [_native.crc32c_many(addresses_of(memory), np.array([n], dtype=np.uint64)) for n in range(64)]
        assert [int(result[0]) for result in kept] == [crc32c_by_definition(bytes(range(n))) for n in range(64)]

    def test_empty(self) -> None:
        nothing = np.zeros(0, dtype=np.uint64)
        assert _native.crc32c_many(nothing, nothing).shape == (0,)

    def test_an_empty_range_may_be_null(self) -> None:
        zero = np.zeros(1, dtype=np.uint64)
        assert _native.crc32c_many(zero, zero).tolist() == [0]

    @pytest.mark.parametrize(
        ("addresses", "sizes", "error", "message"),
        [
            (np.zeros(2, np.uint64), np.zeros(3, np.uint64), ValueError, "2 addresses but 3 sizes"),
            (np.zeros((2, 1), np.uint64), np.zeros(2, np.uint64), ValueError, r"its shape is \[2, 1\]"),
            (np.zeros(2, np.int64), np.zeros(2, np.uint64), TypeError, "addresses must be a contiguous uint64"),
            (np.zeros(2, np.uint64), np.zeros(2, np.float64), TypeError, "sizes must be a contiguous uint64"),
            (np.zeros(4, np.uint64)[::2], np.zeros(2, np.uint64), ValueError, "it is strided"),
            (np.zeros(1, np.uint64), np.ones(1, np.uint64), ValueError, "range 0 is null"),
            (np.full(1, 2**64 - 4, np.uint64), np.full(1, 8, np.uint64), ValueError, "range 0 .* runs past the end"),
        ],
    )
    def test_refuses(
        self, addresses: NDArray[np.uint64], sizes: NDArray[np.uint64], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            _native.crc32c_many(addresses, sizes)


def plan_of(*entries: tuple[int, int, int, int, int, int]) -> NDArray[np.uint64]:
    return np.array(entries, dtype=np.uint64).reshape(-1, 6)


class TestCopyRows:
    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(
        rows=st.integers(0, 9),
        row_bytes=st.integers(0, 300),
        destination_gap=st.integers(0, 40),
        source_gap=st.integers(0, 40),
        offset=st.integers(0, 17),
    )
    def test_follows_strides_and_touches_nothing_else(
        self, rows: int, row_bytes: int, destination_gap: int, source_gap: int, offset: int
    ) -> None:
        random = np.random.default_rng(rows + row_bytes)
        destination_stride, source_stride = row_bytes + destination_gap, row_bytes + source_gap
        destination = random.integers(0, 256, offset + rows * destination_stride + 32, dtype=np.uint8)
        source = random.integers(0, 256, offset + rows * source_stride + 32, dtype=np.uint8)
        expected = destination.copy()
        for row in range(rows):
            target = offset + row * destination_stride
            begin = offset + row * source_stride
            expected[target : target + row_bytes] = source[begin : begin + row_bytes]
        _native.copy_rows(
            plan_of(
                (
                    destination.ctypes.data + offset,
                    source.ctypes.data + offset,
                    rows,
                    row_bytes,
                    destination_stride,
                    source_stride,
                )
            )
        )
        np.testing.assert_array_equal(destination, expected)

    def test_gathers_a_tensor_slice_by_heads(self) -> None:
        heads, tokens, width = 3, 20, 8
        tensor = np.random.default_rng(2).standard_normal((heads, tokens, width), dtype=np.float32)
        record = np.zeros((heads, 5, width), dtype=np.float32)
        _native.copy_rows(
            plan_of(
                (record.ctypes.data, tensor[:, 4:].ctypes.data, heads, 5 * width * 4, 5 * width * 4, tokens * width * 4)
            )
        )
        np.testing.assert_array_equal(record, tensor[:, 4:9])

    def test_many_entries_in_order(self) -> None:
        source = np.arange(64, dtype=np.uint8)
        destination = np.zeros(64, dtype=np.uint8)
        edges = [0, 1, 9, 30, 64]
        pieces = [
            (destination.ctypes.data + begin, source.ctypes.data + begin, 1, end - begin, 0, 0)
            for begin, end in pairwise(edges)
        ]
        first_byte_again = (destination.ctypes.data, source.ctypes.data + 63, 1, 1, 1, 1)
        _native.copy_rows(plan_of(*pieces, first_byte_again))
        assert destination[0] == 63
        np.testing.assert_array_equal(destination[1:], source[1:])

    def test_an_empty_plan_copies_nothing(self) -> None:
        _native.copy_rows(plan_of())

    @pytest.mark.parametrize(
        ("plan", "error", "message"),
        [
            (np.zeros(6, np.uint64), ValueError, r"shape \[n, 6\]; its shape is \[6\]"),
            (np.zeros((1, 5), np.uint64), ValueError, r"shape \[n, 6\]; its shape is \[1, 5\]"),
            (np.zeros((1, 6), np.int64), TypeError, "uint64 array .* its dtype differs"),
            (np.zeros((1, 6), ">u8"), TypeError, "plan"),
            (np.zeros((6, 2), np.uint64).repeat(3, axis=1).T, ValueError, "it is strided"),
            ([[1, 2, 3, 4, 5, 6]], TypeError, "plan"),
        ],
    )
    def test_refuses_other_arrays(self, plan: NDArray[np.uint64], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            _native.copy_rows(plan)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ((0, 64, 1, 8, 8, 8), "has a null destination"),
            ((64, 0, 1, 8, 8, 8), "has a null source"),
            ((64, 4096, 2, 8, 7, 8), "has a stride smaller than its row of 8 bytes"),
            ((64, 4096, 2, 8, 8, 0), "has a stride smaller than its row of 8 bytes"),
            ((64, 4096, 3, 8, 2**63, 8), "runs past the end of the address space"),
            ((64, 2**64 - 4, 1, 8, 8, 8), "runs past the end of the address space"),
            ((64, 4096, 2**63, 2, 2, 2), "runs past the end of the address space"),
            ((64, 71, 1, 8, 8, 8), "has overlapping source and destination"),
        ],
    )
    def test_a_bad_entry_stops_the_plan_before_any_byte(
        self, entry: tuple[int, int, int, int, int, int], message: str
    ) -> None:
        source = np.ones(8, dtype=np.uint8)
        destination = np.zeros(8, dtype=np.uint8)
        good = (destination.ctypes.data, source.ctypes.data, 1, 8, 8, 8)
        with pytest.raises(ValueError, match=f"entry 1 of the plan {message}"):
            _native.copy_rows(plan_of(good, entry))
        assert not destination.any()


# Run by a process of its own for each pair of paths. The reference is NumPy's copy; the checksum that is fused with a
# copy is compared with that of the same bytes alone, which other tests compare with the definition.
COPIES_OF_RANDOM_PLANS = """
import json, numpy as np
from kvstore import _native
random = np.random.default_rng(46)
memory = random.integers(0, 256, 3 << 20, dtype=np.uint8)
plans = 0
for row_bytes_max in (3, 90, 300, 3000, 9000, 200_000):
    for _ in range(8):
        entries, expected, pieces, at = [], np.zeros(1 << 22, np.uint8), [], int(random.integers(0, 99))
        destination = np.zeros(1 << 22, np.uint8)
        checksums = np.zeros(64, np.uint32)
        while len(entries) < 12 and at < 2 << 20:
            rows, row_bytes = int(random.integers(0, 12)), int(random.integers(0, row_bytes_max))
            source_stride = row_bytes + int(random.integers(0, 2) * random.integers(0, 70))
            target_stride = row_bytes + int(random.integers(0, 2) * random.integers(0, 70))
            if rows * target_stride > 1 << 20 or rows * source_stride > 2 << 20:
                continue
            begin = int(random.integers(0, 999))
            for row in range(rows):
                taken = memory[begin + row * source_stride :][:row_bytes]
                expected[at + row * target_stride :][:row_bytes] = taken
            in_order = b"".join(memory[begin + row * source_stride :][:row_bytes].tobytes() for row in range(rows))
            kind = int(random.integers(0, 3)) if pieces and entries[-1][6] else int(random.integers(0, 2))
            if kind == 1:
                pieces.append(b"")
            if kind:
                pieces[-1] += in_order
            place = checksums.ctypes.data + 4 * (len(pieces) - 1) if kind else 0
            addresses = (destination.ctypes.data + at, memory.ctypes.data + begin)
            entries.append((*addresses, rows, row_bytes, target_stride, source_stride, place))
            at += rows * target_stride + int(random.integers(0, 130))
        plan = np.array(entries, np.uint64)
        first, place = destination.ctypes.data, checksums.ctypes.data
        in_place = np.array([(first + 64 * i, 7 * i, place + 4 * i) for i in range(64)], np.uint64)
        for threads in (1, 2, 3):
            for streams in (False, True, None):
                case = (row_bytes_max, threads, streams)
                destination[:] = 0
                _native.copy_rows(np.ascontiguousarray(plan[:, :6]), threads=threads, streams=streams)
                assert np.array_equal(destination, expected), case
                destination[:] = 0
                checksums[:] = 0
                _native.copy_rows_crc32c(plan, threads=threads, streams=streams)
                assert np.array_equal(destination, expected), case
                assert checksums[: len(pieces)].tolist() == [_native.crc32c(piece) for piece in pieces], case
                assert not checksums[len(pieces) :].any()
            _native.crc32c_in_place(in_place, threads=threads)
            assert checksums.tolist() == [_native.crc32c(destination[64 * i :][: 7 * i]) for i in range(64)]
        plans += 1
print(json.dumps([_native.cpu_features(), plans]))
"""


class TestCopyPaths:
    @pytest.mark.parametrize("checksum", NEEDS["crc32c"])
    @pytest.mark.parametrize("path", NEEDS["copy"])
    def test_each_pair_of_paths_copies_as_numpy_does(self, path: str, checksum: str) -> None:
        skip_unless("copy", path)
        skip_unless("crc32c", checksum)
        run = run_python(COPIES_OF_RANDOM_PLANS, copy=path, crc32c=checksum)
        assert run.returncode == 0, run.stderr
        features, plans = json.loads(run.stdout)
        assert (features["copy"], features["crc32c"], plans) == (path, checksum, 48)
        assert features["copy_is_fused"] == (path == checksum == "avx512")

    def test_large_plans_stream_of_themselves_and_agree(self) -> None:
        size = 2 * int(FEATURES["copy_stream_bytes"])
        source = np.random.default_rng(4).integers(0, 256, size, dtype=np.uint8)
        for threads in (1, 2, 3):
            destination, checksum = np.zeros(size, np.uint8), np.zeros(1, np.uint32)
            entry = (destination.ctypes.data, source.ctypes.data, 1, size, size, size, checksum.ctypes.data)
            _native.copy_rows_crc32c(np.array([entry], np.uint64), threads=threads)
            assert np.array_equal(destination, source)
            assert int(checksum[0]) == _native.crc32c(source)
            destination[:] = 0
            _native.copy_rows(plan_of(entry[:6]), threads=threads)
            assert np.array_equal(destination, source)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ((0, 64, 1, 8, 8, 8, 64), "has a null destination"),
            ((64, 71, 1, 8, 8, 8, 64), "has overlapping source and destination"),
            ((64, 4096, 1, 8, 8, 8, 2**64 - 2), "has a place for its checksum that runs past the end"),
        ],
    )
    def test_a_bad_entry_stops_the_plan_before_any_byte(self, entry: tuple[int, ...], message: str) -> None:
        source, destination, checksum = np.ones(8, np.uint8), np.zeros(8, np.uint8), np.zeros(1, np.uint32)
        good = (destination.ctypes.data, source.ctypes.data, 1, 8, 8, 8, checksum.ctypes.data)
        with pytest.raises(ValueError, match=f"copy_rows_crc32c: entry 1 of the plan {message}"):
            _native.copy_rows_crc32c(np.array([good, entry], np.uint64))
        assert not destination.any()
        assert not checksum.any()

    @pytest.mark.parametrize(
        ("entry", "message"),
        [((0, 8, 64), "is null"), ((2**64 - 4, 8, 64), "runs past the end"), ((64, 8, 0), "has no place")],
    )
    def test_a_bad_piece_is_refused(self, entry: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=f"crc32c_in_place: entry 0 of the plan .*{message}"):
            _native.crc32c_in_place(np.array([entry], np.uint64))

    @pytest.mark.parametrize("threads", [0, COPY_THREADS_MAX + 1])
    def test_threads_are_limited(self, threads: int) -> None:
        for call, columns in ((_native.copy_rows, 6), (_native.copy_rows_crc32c, 7), (_native.crc32c_in_place, 3)):
            plan = np.zeros((0, columns), np.uint64)
            with pytest.raises(ValueError, match=f"threads must be 1 to {COPY_THREADS_MAX}, not {threads}"):
                call(plan, threads=threads)
            call(plan, threads=COPY_THREADS_MAX)

    def test_a_forked_child_copies(self) -> None:
        """Threads do not survive a fork; a call in the child starts its own."""
        code = """if True:
            import os, numpy as np, threading
            from kvstore import _native
            source, destination = np.ones(32 << 20, np.uint8), np.zeros(32 << 20, np.uint8)
            entry = (destination.ctypes.data, source.ctypes.data, 1, source.size, source.size, source.size)
            plan = np.array([entry], np.uint64)
            _native.copy_rows(plan, threads=3)
            busy = threading.Thread(target=lambda: [_native.copy_rows(plan, threads=3) for _ in range(20)])
            busy.start()
            child = os.fork()
            if child == 0:
                destination[:] = 0
                _native.copy_rows(plan, threads=3)
                os._exit(0 if destination.all() else 1)
            _, status = os.waitpid(child, 0)
            busy.join()
            print(os.waitstatus_to_exitcode(status))
        """
        run = run_python(code)
        assert (run.stdout, run.stderr) == ("0\n", "")

    def test_addresses(self) -> None:
        arrays = [np.zeros(10, np.uint8), np.zeros(3, np.uint32)]
        assert _native.addresses_of(arrays).tolist() == [array.ctypes.data for array in arrays]
        assert _native.addresses_of([]).shape == (0,)
        with pytest.raises(TypeError):
            _native.addresses_of([3])  # type: ignore[list-item]
        with pytest.raises(BufferError):
            _native.addresses_of([memoryview(b"12345678")[::2]])


class TestChoiceOfPaths:
    @pytest.mark.parametrize("job", VARIABLES)
    def test_the_best_path_is_chosen(self, job: str) -> None:
        run = run_python(PRINT_FEATURES, **{job: ""})
        assert run.returncode == 0, run.stderr
        features = json.loads(run.stdout)
        assert features[job] == best_path(job)
        assert (features[f"{job}_why_not_better"] == "") == (best_path(job) == list(NEEDS[job])[-1])

    @pytest.mark.parametrize("job", VARIABLES)
    def test_a_forced_worse_path_says_so(self, job: str) -> None:
        features = json.loads(run_python(PRINT_FEATURES, **{job: "portable"}).stdout)
        assert features[f"{job}_why_not_better"] == f"{VARIABLES[job]}=portable forces it"

    @pytest.mark.parametrize(("job", "noun"), [("crc32c", "checksum"), ("copy", "copy")])
    def test_an_unknown_path_fails_the_import(self, job: str, noun: str) -> None:
        run = run_python("import kvstore._native", **{job: "avx9"})
        assert run.returncode == 1
        assert f"ImportError: {VARIABLES[job]}=avx9 names no {noun} path; use one of '" in run.stderr

    @pytest.mark.parametrize(("job", "path"), [(job, path) for job, paths in NEEDS.items() for path in paths])
    def test_a_path_that_the_cpu_lacks_fails_the_import(self, job: str, path: str) -> None:
        if can_run(job, path):
            pytest.skip("this CPU can run it")
        run = run_python("import kvstore._native", **{job: path})
        assert run.returncode == 1
        assert f"ImportError: {VARIABLES[job]}={path} cannot be used" in run.stderr


class TestGil:
    """With thread switches forbidden, another thread moves only while the native call has given the GIL up."""

    BYTES = 4 << 20

    def progress_during(self, call: Callable[[], object]) -> int:
        count = 0
        stop = threading.Event()

        def other() -> None:
            nonlocal count
            while not stop.is_set():
                count += 1
                time.sleep(0)

        interval = sys.getswitchinterval()
        thread = threading.Thread(target=other)
        sys.setswitchinterval(100)
        try:
            thread.start()
            deadline = time.monotonic() + 20
            progress = 0
            while progress == 0 and time.monotonic() < deadline:
                before = count
                call()
                progress = count - before
        finally:
            stop.set()
            sys.setswitchinterval(interval)
            thread.join()
        return progress

    def test_released_by_crc32c(self) -> None:
        data = bytes(self.BYTES)
        assert self.progress_during(lambda: _native.crc32c(data)) > 0

    def test_released_by_crc32c_many(self) -> None:
        memory = np.zeros(self.BYTES, dtype=np.uint8)
        addresses, sizes = addresses_of(memory), np.array([memory.size], dtype=np.uint64)
        assert self.progress_during(lambda: _native.crc32c_many(addresses, sizes)) > 0

    def test_released_by_copy_rows_crc32c(self) -> None:
        source, destination = np.zeros(self.BYTES, dtype=np.uint8), np.zeros(self.BYTES, dtype=np.uint8)
        checksum = np.zeros(1, np.uint32)
        addresses = (destination.ctypes.data, source.ctypes.data)
        plan = np.array([(*addresses, 1, self.BYTES, self.BYTES, self.BYTES, checksum.ctypes.data)], np.uint64)
        assert self.progress_during(lambda: _native.copy_rows_crc32c(plan)) > 0

    def test_released_by_copy_rows(self) -> None:
        source = np.zeros(self.BYTES, dtype=np.uint8)
        destination = np.zeros(self.BYTES, dtype=np.uint8)
        plan = plan_of((destination.ctypes.data, source.ctypes.data, 1, self.BYTES, self.BYTES, self.BYTES))
        assert self.progress_during(lambda: _native.copy_rows(plan)) > 0


def test_features_name_everything_in_use() -> None:
    text = {"version", "compiler", "architecture", "crc32c", "crc32c_why_not_better", "copy", "copy_why_not_better"}
    flags = {"stable_abi", "sse42", "pclmul", "avx2", "avx512f", "vpclmulqdq", "copy_is_fused"}
    assert FEATURES.keys() == text | flags | {"copy_stream_bytes"}
    assert all(isinstance(FEATURES[name], str) for name in text)
    assert all(isinstance(FEATURES[name], bool) for name in flags)
    assert int(FEATURES["copy_stream_bytes"]) >= 1 << 20


def test_addresses_are_those_of_ctypes() -> None:
    """NumPy's, ctypes' and torch's addresses are all plain integers of one address space."""
    buffer = ctypes.create_string_buffer(b"123456789", 9)
    address = np.array([ctypes.addressof(buffer)], dtype=np.uint64)
    assert _native.crc32c_many(address, np.array([9], dtype=np.uint64)).tolist() == [0xE3069283]
