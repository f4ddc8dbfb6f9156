"""What a directory holds records of: its format version, its identity and its model spec, twice."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import crc32c
from kvstore.clock import Deadline
from kvstore.errors import SpecError, SsdDirectoryError
from kvstore.limits import FILE_ALIGN_BYTES, SPEC_FILE_BYTES_MAX, SSD_RECOVERY_DEADLINE_S
from kvstore.spec import ModelSpec
from kvstore.tiers.ssd.memory import aligned, padded
from kvstore.tiers.ssd.moves import read, sync, write
from kvstore.tiers.ssd.names import MANIFEST

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.abc.files import Files

DIRECTORY_VERSION = 1
MAGIC = b"KVSMNFT1"
# Magic, version, checksum of this head, directory id, fingerprint, bytes and checksum of the spec's JSON, reserved.
_HEAD = struct.Struct("<8sII16s32sII24x")
_HEAD_CRC_OFFSET = 12
_COPY_BYTES_MAX = padded(_HEAD.size + SPEC_FILE_BYTES_MAX)


@dataclass(frozen=True)
class Manifest:
    """What the manifest says.

    Attributes:
        directory_id: 16 random bytes, in every head of the directory's other files.
        spec: the model.
    """

    directory_id: bytes
    spec: ModelSpec

    def pack(self) -> npt.NDArray[np.uint8]:
        """The file: two equal copies, each a multiple of `FILE_ALIGN_BYTES`."""
        payload = self.spec.to_json().encode()
        head = bytearray(
            _HEAD.pack(
                MAGIC, DIRECTORY_VERSION, 0, self.directory_id, self.spec.fingerprint, len(payload), crc32c(payload)
            )
        )
        struct.pack_into("<I", head, _HEAD_CRC_OFFSET, crc32c(head))
        copy = aligned(len(head) + len(payload))
        copy[: len(head) + len(payload)] = np.frombuffer(bytes(head) + payload, np.uint8)
        both = aligned(2 * copy.nbytes)
        both[: copy.nbytes] = copy
        both[copy.nbytes :] = copy
        return both


def write_manifest(files: Files, manifest: Manifest, deadline: Deadline) -> None:
    """Make the file and make it safe, all but its name. Raises `OSError` or `DeadlineError`."""
    file = files.create(MANIFEST)
    try:
        write(files, file, 0, manifest.pack(), deadline)
        sync(files, [file], deadline)
    finally:
        files.close_file(file)


def read_manifest(files: Files) -> Manifest | None:
    """The manifest; None if neither copy is sound.

    Raises:
        SsdDirectoryError: it is of a newer format, or larger than any.
        OSError, DeadlineError: it cannot be read.
    """
    file = files.open(MANIFEST)
    try:
        size_bytes = files.size(file)
        if size_bytes > 2 * _COPY_BYTES_MAX:
            raise SsdDirectoryError(f"{files.directory}/{MANIFEST} has {size_bytes} bytes, more than any manifest")
        whole = size_bytes // FILE_ALIGN_BYTES * FILE_ALIGN_BYTES
        if not whole:
            return None
        data = read(files, file, 0, whole, Deadline.after(SSD_RECOVERY_DEADLINE_S)).tobytes()
    finally:
        files.close_file(file)
    # The second copy is found by its magic, since the size of the first may be what is damaged.
    for at in range(0, whole, FILE_ALIGN_BYTES):
        if data.startswith(MAGIC, at):
            manifest = _parse(data[at:], files.directory)
            if manifest is not None:
                return manifest
    return None


def _parse(data: bytes, directory: str) -> Manifest | None:
    _, version, head_checksum, directory_id, fingerprint, payload_bytes, checksum = _HEAD.unpack_from(data)
    head = bytearray(data[: _HEAD.size])
    head[_HEAD_CRC_OFFSET : _HEAD_CRC_OFFSET + 4] = bytes(4)
    if crc32c(head) != head_checksum:
        return None
    if version != DIRECTORY_VERSION:
        raise SsdDirectoryError(
            f"{directory} is of directory format {version}, this release knows {DIRECTORY_VERSION}; use the release "
            "that wrote it, or another directory"
        )
    payload = data[_HEAD.size : _HEAD.size + payload_bytes]
    if len(payload) != payload_bytes or crc32c(payload) != checksum:
        return None
    try:
        spec = ModelSpec.from_json(payload.decode())
    except (SpecError, UnicodeDecodeError):
        return None
    return Manifest(directory_id, spec) if spec.fingerprint == fingerprint else None
