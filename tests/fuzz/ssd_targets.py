"""Files of an SSD directory, damaged: the journal, the manifest, head and tail of a segment."""

from __future__ import annotations

import random
import struct
from contextlib import closing
from functools import lru_cache
from unittest import mock

import numpy as np

from kvstore._native import crc32c
from kvstore.limits import FILE_ALIGN_BYTES
from kvstore.record import record_layout
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.testing.specs import hybrid
from kvstore.tiers.ssd.directory import SsdDirectory
from kvstore.tiers.ssd.finding import Finding, find, own_manifest
from kvstore.tiers.ssd.footer import head_bytes
from kvstore.tiers.ssd.frame import FRAME_MAGIC, HEAD_BYTES
from kvstore.tiers.ssd.manifest import Manifest, read_manifest
from kvstore.tiers.ssd.names import MANIFEST, parse_name
from kvstore.tiers.ssd.segment import find_segment
from tests.ssd.contents import append, path_of, whole_load

SPEC = hybrid(4)
_PAYLOAD_BYTES_OFFSET = 68
_JOURNAL_CHECKSUMS = 8, 12
_MANIFEST_CHECKSUM = 12
_MANIFEST_HEAD_BYTES = 96


@lru_cache(maxsize=1)
def made() -> tuple[ForgetfulDisk, Manifest]:
    """A directory with some of everything in its journal; its random numbers are the same every time."""
    disk = ForgetfulDisk(seed=1)
    nodes = path_of(SPEC, range(22), b"salt")
    with mock.patch("os.urandom", random.Random(1).randbytes):
        directory = SsdDirectory.open(disk.files(), SPEC, capacity_bytes=1 << 30)
        with closing(directory):
            append(directory, whole_load(SPEC, nodes))
            directory.forget([nodes[-1].key], [True])
            append(directory, whole_load(SPEC, path_of(SPEC, range(9), b"other")))
    manifest = own_manifest(disk.files(), SPEC)
    assert manifest is not None
    return disk, manifest


def _file(prefix: str) -> str:
    return next(name for name in made()[0].names if name.startswith(prefix))


def _put(name: str, data: bytes) -> ForgetfulDisk:
    disk, _ = made()
    disk.names[name].seen = bytearray(data)
    return disk


def seed_journals() -> tuple[bytes, ...]:
    return (bytes(made()[0].names[_file("journal")].safe),)


def parse_journal(data: bytes) -> Finding:
    """What a directory with this journal holds."""
    disk = _put(_file("journal"), data)
    files = disk.files()
    try:
        finding = find(files, made()[1])
    finally:
        files.close()
    nodes, records = finding.nodes, finding.records
    assert len(np.unique(nodes.keys, axis=0)) == len(nodes)
    assert not len(records) or (records.node.min() >= 0 and records.node.max() < len(nodes))
    for number, offset, slot_bytes in records.place.tolist():
        segment = finding.segments[number]
        assert head_bytes(segment.layout) <= offset <= segment.end - slot_bytes
    return finding


def mend_journal(data: bytes) -> bytes:
    """With right checksums in whatever begins like a frame."""
    mended = bytearray(data)
    for at in range(0, len(mended) - HEAD_BYTES + 1, FILE_ALIGN_BYTES):
        if not mended.startswith(FRAME_MAGIC, at):
            continue
        (size,) = struct.unpack_from("<I", mended, at + _PAYLOAD_BYTES_OFFSET)
        begin = at + HEAD_BYTES
        of_head, of_payload = (at + offset for offset in _JOURNAL_CHECKSUMS)
        struct.pack_into("<I", mended, of_payload, crc32c(bytes(mended[begin : begin + size])))
        struct.pack_into("<I", mended, of_head, 0)
        struct.pack_into("<I", mended, of_head, crc32c(bytes(mended[at : at + HEAD_BYTES])))
    return bytes(mended)


def seed_manifests() -> tuple[bytes, ...]:
    return (made()[1].pack().tobytes(),)


def parse_manifest(data: bytes) -> Manifest | None:
    files = _put(MANIFEST, data).files()
    try:
        return read_manifest(files)
    finally:
        files.close()


def mend_manifest(data: bytes) -> bytes:
    """With the right checksum in its heads."""
    mended = bytearray(data)
    for at in range(0, len(mended) - _MANIFEST_HEAD_BYTES + 1, FILE_ALIGN_BYTES):
        if mended.startswith(b"KVSMNFT1", at):
            struct.pack_into("<I", mended, at + _MANIFEST_CHECKSUM, 0)
            checksum = crc32c(bytes(mended[at : at + _MANIFEST_HEAD_BYTES]))
            struct.pack_into("<I", mended, at + _MANIFEST_CHECKSUM, checksum)
    return bytes(mended)


def seed_segments() -> tuple[bytes, ...]:
    return (bytes(made()[0].names[_file("segment-0000000002")].safe),)


def parse_segment(data: bytes) -> object:
    name = _file("segment-0000000002")
    files = _put(name, data).files()
    found = parse_name(name)
    assert found is not None
    layout = record_layout(SPEC, 1, 0, SPEC.groups[1].all_units)
    try:
        segment = find_segment(files, found, layout, made()[1].directory_id)
        assert segment is None or segment.size_bytes <= len(data)
        return segment
    finally:
        files.close()
