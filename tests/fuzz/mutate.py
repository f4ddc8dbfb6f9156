"""Damaging bytes in the ways that find bugs in parsers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

TELLING_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
TELLING_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
MUTATIONS_MAX = 8
RUN_BYTES_MAX = 32


def mutate(generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One seed with up to `MUTATIONS_MAX` changes; now and then bytes that come from no seed."""
    if generator.random() < 0.02:
        return generator.randbytes(generator.randrange(512))
    data = bytearray(generator.choice(seeds))
    for _ in range(generator.randint(1, MUTATIONS_MAX)):
        _change(generator, data, seeds)
    return bytes(data)


def _change(generator: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = generator.randint(0, len(data))
    size = generator.randint(1, RUN_BYTES_MAX)
    match generator.randrange(8):
        case 0:
            data[at : at + 1] = bytes([generator.choice(TELLING_BYTES)])
        case 1 if at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        case 2:
            width = generator.choice((1, 2, 4, 8))
            number = generator.choice(TELLING_NUMBERS) & ((1 << 8 * width) - 1)
            data[at : at + width] = number.to_bytes(width, "little")
        case 3:
            del data[at : at + size]
        case 4:
            data[at:at] = data[at : at + size]
        case 5:
            del data[at:]
        case 6:
            other = generator.choice(seeds)
            begin = generator.randint(0, len(other))
            data[at : at + size] = other[begin : begin + size]
        case _:
            data[at : at + size] = generator.randbytes(size)
