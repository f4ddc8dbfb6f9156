// The 64-byte frame header and the rows of a DATA frame's table (docs/protocol.md, "Frames").
//
// The same checks, in the same order, as kvstore/transfer/frames.py; a header is checked completely before a byte of
// its payload is received.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "limits.h"

namespace kvstore::net {

static_assert(std::endian::native == std::endian::little, "rows and headers are little-endian and read in place");

enum class Kind : std::uint8_t {
    hello = 1,
    offer = 2,
    want = 3,
    expose = 4,
    data = 5,
    seal = 6,
    credit = 7,
    commit = 8,
    committed = 9,
    abort = 10,
    aborted = 11,
    ping = 12,
    pong = 13,
    lost = 14,
    query = 32,
    candidates = 33,
    fetch = 34,
};

inline constexpr std::uint8_t flag_remote = 1;
inline constexpr std::uint16_t protocol_version = 1;

struct TransferId {
    std::uint64_t epoch = 0;
    std::uint64_t counter = 0;
    bool operator==(const TransferId&) const = default;
};

struct FrameHeader {
    Kind kind = Kind::ping;
    std::uint8_t flags = 0;
    TransferId transfer;
    std::uint64_t generation = 0;
    std::uint32_t payload_bytes = 0;
    std::uint32_t piece_count = 0;
    std::uint32_t payload_crc32c = 0;

    std::size_t table_bytes() const { return piece_count * piece_row_bytes; }
    // Bytes of the pieces that follow a DATA frame's table.
    std::size_t body_bytes() const { return payload_bytes - table_bytes(); }
};

struct PieceRow {
    std::uint32_t record;
    std::uint32_t piece;
    std::uint32_t size_bytes;
    std::uint32_t crc32c;
};
static_assert(sizeof(PieceRow) == piece_row_bytes);

using HeaderBytes = std::array<std::byte, frame_header_bytes>;

// Throws NetError(protocol) for what the peer would have to refuse.
HeaderBytes pack_header(const FrameHeader& header);

// Throws NetError: protocol (damaged, unknown kind, beyond the limits) or mismatch (an intact foreign version).
FrameHeader parse_header(std::span<const std::byte, frame_header_bytes> bytes);

}  // namespace kvstore::net
