"""The native parser and writer of frames against the Python ones, which docs/protocol.md was written from."""

from __future__ import annotations

import random
import socket
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import limits
from kvstore._native import (
    Arrivals,
    Departures,
    PieceLayout,
    Stream,
    crc32c,
    frame_limits,
    pack_frame_header,
    parse_frame_header,
)
from kvstore.errors import DeadlineError, KVStoreError, PeerGoneError, PeerMismatchError, ProtocolError, TransportError
from kvstore.transfer.frames import FrameHeader, Kind, TransferId, parse_header
from kvstore.transfer.link import DATA_PATH_VARIABLE, uses_native_path

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


def test_the_native_limits_are_those_of_the_library() -> None:
    for name, value in frame_limits().items():
        assert value == getattr(limits, name), name


def fields(header: FrameHeader) -> tuple[int, ...]:
    return (
        int(header.kind), header.flags, *header.transfer, header.generation, header.payload_bytes, header.piece_count,
        header.payload_crc32c,
    )  # fmt: skip


@given(
    st.sampled_from(list(Kind)), st.integers(0, 3), U64, U64, U64,
    st.one_of(st.integers(0, 40), U32), st.one_of(st.integers(0, 4), st.integers(0, 5000)), U32,
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_headers_are_the_same_byte_for_byte(
    kind: Kind, flags: int, epoch: int, counter: int, generation: int, payload: int, pieces: int, crc: int
) -> None:
    header = FrameHeader(kind, TransferId(epoch, counter), generation, payload, pieces, crc, flags)
    try:
        packed = header.pack()
    except ProtocolError:
        with pytest.raises(ProtocolError):
            pack_frame_header(*fields(header))
        return
    assert pack_frame_header(*fields(header)) == packed
    assert parse_frame_header(packed) == fields(header) == fields(parse_header(packed))


def test_both_parsers_refuse_the_same_headers() -> None:
    generator = random.Random(5)
    outcomes: set[type] = set()
    for _ in range(3000):
        kind = generator.choice(list(Kind))
        pieces = generator.choice([1, 2, 4096]) if kind is Kind.DATA else 0
        payload = pieces * 17 if kind is Kind.DATA else 0
        data = bytearray(FrameHeader(kind, TransferId(1, 2), 3, payload, pieces).pack())
        for _ in range(generator.randrange(3)):
            data[generator.randrange(64)] = generator.randrange(256)
        if generator.random() < 0.8:
            struct.pack_into("<I", data, 60, crc32c(bytes(data[:60])))
        results: list[object] = []
        for parse in (lambda d: fields(parse_header(d)), parse_frame_header):
            try:
                results.append(parse(data))
            except KVStoreError as error:
                results.append(type(error))
        assert results[0] == results[1], data.hex()
        outcomes.add(results[0] if isinstance(results[0], type) else tuple)
    assert outcomes == {tuple, ProtocolError, PeerMismatchError}


def test_a_header_has_64_bytes() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        parse_frame_header(bytes(63))


def test_an_unknown_data_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_PATH_VARIABLE, "rust")
    with pytest.raises(TransportError, match="rust"):
        uses_native_path()
    for value, expected in (("python", False), ("native", True), ("", True)):
        monkeypatch.setenv(DATA_PATH_VARIABLE, value)
        assert uses_native_path() is expected


def stream_pair(progress_deadline_s: float = 10.0) -> tuple[Stream, socket.socket]:
    ours, theirs = socket.socketpair()
    return Stream(ours.detach(), "the test", progress_deadline_s), theirs


def test_a_stream_sends_and_receives() -> None:
    stream, peer = stream_pair()
    with peer:
        stream.send([b"abc", bytearray(), memoryview(b"def")])
        assert peer.recv(10) == b"abcdef"
        peer.sendall(bytes(range(64)) + b"tail")
        assert stream.wait_readable(time.monotonic() + 30)
        assert stream.receive_header(time.monotonic() + 30) == bytes(range(64))
        into = bytearray(4)
        stream.receive_into(into)
        assert into == b"tail"
        with pytest.raises(DeadlineError):
            stream.receive_header(time.monotonic() + 0.01)
        assert not stream.wait_readable(time.monotonic() + 0.01)
        # Nothing had come, so the stream goes on.
        peer.sendall(bytes(64))
        assert stream.receive_header(time.monotonic() + 30) == bytes(64)
        with pytest.raises((BufferError, TypeError)):
            stream.receive_into(b"read only")
        stream.close()
        stream.close()
        with pytest.raises(PeerGoneError, match="closed by this side"):
            stream.send([b"x"])


def test_a_header_cut_in_two_ends_the_stream() -> None:
    stream, peer = stream_pair()
    with peer:
        peer.sendall(bytes(10))
        with pytest.raises(DeadlineError, match="54 of 64"):
            stream.receive_header(time.monotonic() + 0.01)
        with pytest.raises(PeerGoneError):
            stream.receive_header(time.monotonic() + 0.01)


def test_a_peer_that_has_gone() -> None:
    stream, peer = stream_pair()
    peer.close()
    with pytest.raises(PeerGoneError, match="closed the connection"):
        stream.receive_header(time.monotonic() + 30)
    with pytest.raises(PeerGoneError, match="broke while sending"):
        stream.send([bytes(10)])


def test_arguments_are_checked() -> None:
    layout = PieceLayout(np.array([0, 8], np.uint64), np.array([8, 8], np.uint32), 16)
    assert layout.piece_count == 2
    with pytest.raises(ValueError, match="as many offsets"):
        PieceLayout(np.array([0], np.uint64), np.array([8, 8], np.uint32), 16)
    with pytest.raises(ValueError, match="multiple of 8"):
        PieceLayout(np.array([0], np.uint32), np.array([8], np.uint32), 16)
    memory = np.zeros(64, np.uint8)
    address = np.array([memory.ctypes.data], np.uint64)
    arrivals = Arrivals(1)
    with pytest.raises(ValueError, match="out of range"):
        arrivals.add_records(np.array([1], np.uint32), layout, address)
    arrivals.add_records(np.array([0], np.uint32), layout, address)
    with pytest.raises(ValueError, match="twice"):
        arrivals.add_records(np.array([0], np.uint32), layout, address)
    with pytest.raises(ValueError, match="multiple of 16"):
        arrivals.claim(bytes(15), None)
    with pytest.raises(ValueError, match="layout number"):
        Departures([layout], np.array([1], np.uint32), address)
    departures = Departures([layout], np.array([0], np.uint32), address)
    with pytest.raises(IndexError):
        departures.pieces_whole(1, np.array([0], np.uint32))
    with pytest.raises(IndexError):
        departures.pieces_whole(0, np.array([2], np.uint32))
    with pytest.raises(ProtocolError, match="never offered"):
        departures.want(np.array([0, 1, 2], np.uint32), False)
