"""What differs from record to record of one class: the fields patched into the prepared framing."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import RecordError
from kvstore.limits import PROMPT_TOKENS_MAX
from kvstore.record.schema import parse_digest

# Each field is ASCII of fixed width, so that the Arrow framing is built once and patched in place.
FIELD_WIDTHS = {
    "kvstore.key": 64,
    "kvstore.parent": 64,
    "kvstore.grid": 64,
    "kvstore.end_tokens": 12,
    "kvstore.valid_tokens": 8,
    "kvstore.cost_us": 16,
    "kvstore.metadata_crc32c": 15,
}
CHECKSUM_FIELD = "kvstore.metadata_crc32c"
CHECKSUM_PREFIX = b"crc32c:"
CHECKSUM_ZERO = CHECKSUM_PREFIX + b"0" * 8
"""The checksum field while the checksum is computed. The prefix lets a reader find the field."""


@dataclass(frozen=True)
class RecordHeader:
    """Per-record metadata.

    Attributes:
        key: prefix key of the node that the record belongs to (32 bytes).
        parent: key of the node before it; the chain's root key for the first.
        end_tokens: length of the prefix at whose end the record lies.
        valid_tokens: tokens that it really holds; 0 without a token axis.
        grid: digest of the chunk boundaries under which it was computed (32 bytes).
        cost_us: microseconds of prefill that it saves, 0 if unknown.
    """

    key: bytes
    parent: bytes
    end_tokens: int
    valid_tokens: int
    grid: bytes
    cost_us: int = 0

    def __post_init__(self) -> None:
        # The fields have fixed widths: what does not fit would shift everything after it.
        if not len(self.key) == len(self.parent) == len(self.grid) == 32:
            raise RecordError("a record's key, parent and grid are digests of 32 bytes")
        tokens_fit = 0 <= self.valid_tokens <= self.end_tokens and 1 <= self.end_tokens <= PROMPT_TOKENS_MAX
        if not tokens_fit or self.cost_us < 0:
            raise RecordError(
                f"a record of {self.valid_tokens} tokens that ends at {self.end_tokens} and saves {self.cost_us} us "
                f"cannot be; a prompt has at most {PROMPT_TOKENS_MAX} tokens"
            )

    @classmethod
    def from_fields(cls, fields: dict[str, bytes]) -> RecordHeader:
        """Parse the fixed-width ASCII fields.

        Raises:
            RecordError: a field is missing, of the wrong width, or not what it should be.
        """
        for name, width in FIELD_WIDTHS.items():
            if len(fields.get(name, b"")) != width:
                raise RecordError(f"record metadata field {name} is missing or not {width} bytes wide")
        try:
            return cls(
                key=parse_digest(fields["kvstore.key"].decode("ascii")),
                parent=parse_digest(fields["kvstore.parent"].decode("ascii")),
                grid=parse_digest(fields["kvstore.grid"].decode("ascii")),
                end_tokens=_decimal(fields["kvstore.end_tokens"]),
                valid_tokens=_decimal(fields["kvstore.valid_tokens"]),
                cost_us=_decimal(fields["kvstore.cost_us"]),
            )
        except ValueError as error:
            raise RecordError(f"record metadata is malformed: {error}") from error


def blank_field(name: str) -> bytes:
    """What stands in the prepared framing where a field will be patched in."""
    return CHECKSUM_ZERO if name == CHECKSUM_FIELD else b"0" * FIELD_WIDTHS[name]


def checksum_field(checksum: int) -> bytes:
    """The ASCII form of a metadata checksum."""
    return CHECKSUM_PREFIX + b"%08x" % checksum


def _decimal(field: bytes) -> int:
    if not field.isdigit():
        raise ValueError(f"{field!r} is not a decimal number")
    return int(field)
