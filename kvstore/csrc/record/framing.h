// The framing of records: the class's prepared header, with the fields in which records differ patched in.
//
// docs/format.md says what the fields are; kvstore/record/header.py parses them again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvstore {

inline constexpr std::size_t digest_bytes = 32;

// Where the fields lie in the header. Each is ASCII of fixed width.
struct FieldOffsets {
    std::uint64_t key;
    std::uint64_t parent;
    std::uint64_t grid;
    std::uint64_t end_tokens;
    std::uint64_t valid_tokens;
    std::uint64_t cost_us;
    std::uint64_t metadata_crc32c;
};
static_assert(sizeof(FieldOffsets) == 7 * sizeof(std::uint64_t));

inline constexpr std::size_t digest_field_bytes = 2 * digest_bytes;
inline constexpr std::size_t end_tokens_field_bytes = 12;
inline constexpr std::size_t valid_tokens_field_bytes = 8;
inline constexpr std::size_t cost_us_field_bytes = 16;
inline constexpr std::size_t checksum_field_bytes = 15;

// Bytes of the body that belong to no piece; they are zero.
struct Gap {
    std::uint64_t offset;
    std::uint64_t size_bytes;
};
static_assert(sizeof(Gap) == 2 * sizeof(std::uint64_t));

// What records of one class have in common.
struct FramingClass {
    std::span<const std::byte> header_template;  // with every field blank
    FieldOffsets fields;
    std::uint32_t schema_checksum;  // where the metadata checksum begins
    std::uint64_t checksum_offset;  // of the column of piece checksums
    std::uint64_t checksum_bytes;
    std::span<const Gap> gaps;
};

struct RecordFields {
    std::array<std::byte, digest_bytes> key;
    std::array<std::byte, digest_bytes> parent;
    std::array<std::byte, digest_bytes> grid;
};
static_assert(sizeof(RecordFields) == 3 * digest_bytes);

struct RecordNumbers {
    std::uint64_t end_tokens;
    std::uint64_t valid_tokens;
    std::uint64_t cost_us;
};
static_assert(sizeof(RecordNumbers) == 3 * sizeof(std::uint64_t));

// Throws std::invalid_argument when a field lies outside of the header.
void check_framing(const FramingClass& framing);

// Writes the header and zeroes the gaps of the record at `record`. A number too large for its field is stored as the
// largest that fits. REQUIRES: check_framing passed; the record is mapped, and its checksum column is in place.
void frame_record(const FramingClass& framing, const RecordFields& fields, const RecordNumbers& numbers,
                  std::byte* record);

// One piece of a record and the place of its checksum follow from the class: piece i has checksum i of the column.
struct PieceRange {
    std::uint64_t offset;
    std::uint64_t size_bytes;
};
static_assert(sizeof(PieceRange) == 2 * sizeof(std::uint64_t));

// Whether the record at `record` is what `frame_record` left there, its pieces have the checksums of its column, and its
// gaps are zero. REQUIRES: check_framing passed; the record is mapped, pieces and checksum column lie within it.
bool is_intact(const FramingClass& framing, std::span<const PieceRange> pieces, const RecordFields& fields,
               const RecordNumbers& numbers, const std::byte* record);

}  // namespace kvstore
