#include "frame.h"

#include <cstring>
#include <string>

#include "../checksum/crc32c.h"
#include "error.h"

namespace kvstore::net {
namespace {

// The header as it lies on the wire: every field is naturally aligned, so there is no padding.
struct WireHeader {
    std::array<char, 4> magic;
    std::uint16_t version;
    std::uint8_t kind;
    std::uint8_t flags;
    std::uint64_t epoch;
    std::uint64_t counter;
    std::uint64_t generation;
    std::uint32_t payload_bytes;
    std::uint32_t piece_count;
    std::uint32_t payload_crc32c;
    std::array<std::uint8_t, 16> reserved;
    std::uint32_t header_crc32c;
};
static_assert(sizeof(WireHeader) == frame_header_bytes);
static_assert(offsetof(WireHeader, epoch) == 8 && offsetof(WireHeader, payload_bytes) == 32);
static_assert(offsetof(WireHeader, reserved) == 44 && offsetof(WireHeader, header_crc32c) == 60);

constexpr std::array<char, 4> magic = {'K', 'V', 'S', 'T'};
constexpr std::size_t checked_bytes = offsetof(WireHeader, header_crc32c);

struct KindLimit {
    Kind kind;
    const char* name;
    std::size_t payload_bytes_max;
};

constexpr std::size_t commit_fixed_bytes = 24;
constexpr std::array kind_limits = {
    KindLimit{Kind::hello, "HELLO", 1 * kib},
    KindLimit{Kind::offer, "OFFER", frame_payload_bytes_max},
    KindLimit{Kind::want, "WANT", frame_payload_bytes_max},
    KindLimit{Kind::expose, "EXPOSE", 1 * mib},
    KindLimit{Kind::data, "DATA", 0},
    KindLimit{Kind::seal, "SEAL", 1 * mib},
    KindLimit{Kind::credit, "CREDIT", 16},
    KindLimit{Kind::commit, "COMMIT", handover_payload_bytes_max + commit_fixed_bytes},
    KindLimit{Kind::committed, "COMMITTED", 32},
    KindLimit{Kind::abort, "ABORT", 2 * kib},
    KindLimit{Kind::aborted, "ABORTED", 0},
    KindLimit{Kind::ping, "PING", 0},
    KindLimit{Kind::pong, "PONG", 0},
    KindLimit{Kind::lost, "LOST", 8},
    KindLimit{Kind::query, "QUERY", frame_payload_bytes_max},
    KindLimit{Kind::candidates, "CANDIDATES", 2 * kib},
    KindLimit{Kind::fetch, "FETCH", 16},
};

[[noreturn]] void refuse(const std::string& message) {
    throw NetError(Fault::protocol, message);
}

const KindLimit& limit_of(std::uint8_t number) {
    for (const KindLimit& limit : kind_limits) {
        if (static_cast<std::uint8_t>(limit.kind) == number) {
            return limit;
        }
    }
    refuse("frame kind " + std::to_string(number) + " is not known in protocol version " +
           std::to_string(protocol_version));
}

void check_data(const FrameHeader& header) {
    const std::string pieces = std::to_string(header.piece_count);
    if (header.piece_count < 1 || header.piece_count > frame_pieces_max) {
        refuse("a DATA frame has 1 to " + std::to_string(frame_pieces_max) + " pieces, not " + pieces);
    }
    const bool is_table_whole = header.payload_bytes >= header.table_bytes();
    if ((header.flags & flag_remote) != 0) {
        if (!is_table_whole || header.body_bytes() != 0) {
            refuse("a DATA frame names exposed pieces, and its payload is not just their table");
        }
        return;
    }
    const std::size_t limit =
        header.piece_count == 1 ? record_bytes_max : frame_payload_bytes_max - header.table_bytes();
    if (!is_table_whole || header.body_bytes() < header.piece_count || header.body_bytes() > limit) {
        const std::string carried = is_table_whole ? std::to_string(header.body_bytes()) : "too few";
        refuse("a DATA frame of " + pieces + " pieces carries " + carried + " bytes; the limit is " +
               std::to_string(limit));
    }
}

void check_lengths(const FrameHeader& header, const KindLimit& limit) {
    const std::string name = limit.name;
    if ((header.flags & ~flag_remote) != 0 || (header.flags != 0 && header.kind != Kind::data)) {
        refuse("a " + name + " frame carries unknown flags " + std::to_string(header.flags));
    }
    if (header.kind == Kind::data) {
        check_data(header);
        return;
    }
    if (header.payload_bytes > limit.payload_bytes_max) {
        refuse("a " + name + " frame of " + std::to_string(header.payload_bytes) + " bytes is above its limit of " +
               std::to_string(limit.payload_bytes_max));
    }
    if (header.piece_count != 0) {
        refuse("a " + name + " frame claims " + std::to_string(header.piece_count) + " pieces; only DATA has any");
    }
}

}  // namespace

HeaderBytes pack_header(const FrameHeader& header) {
    check_lengths(header, limit_of(static_cast<std::uint8_t>(header.kind)));
    WireHeader wire{magic,
                    protocol_version,
                    static_cast<std::uint8_t>(header.kind),
                    header.flags,
                    header.transfer.epoch,
                    header.transfer.counter,
                    header.generation,
                    header.payload_bytes,
                    header.piece_count,
                    header.payload_crc32c,
                    {},
                    0};
    wire.header_crc32c = crc32c(&wire, checked_bytes);
    return std::bit_cast<HeaderBytes>(wire);
}

FrameHeader parse_header(std::span<const std::byte, frame_header_bytes> bytes) {
    WireHeader wire;
    std::memcpy(&wire, bytes.data(), sizeof(wire));
    if (wire.magic != magic) {
        refuse("a frame begins with other bytes than 'KVST'; the peer speaks another protocol");
    }
    if (wire.header_crc32c != crc32c(&wire, checked_bytes)) {
        refuse("a frame header is damaged: its checksum does not hold");
    }
    if (wire.version != protocol_version) {
        throw NetError(Fault::mismatch, "the peer sent a frame of protocol version " + std::to_string(wire.version) +
                                            ", this side speaks version " + std::to_string(protocol_version) +
                                            "; use releases of kvstore that share a version");
    }
    const KindLimit& limit = limit_of(wire.kind);
    if (wire.reserved != decltype(wire.reserved){}) {
        refuse(std::string("the reserved bytes of a ") + limit.name + " header are not zero");
    }
    const FrameHeader header{limit.kind,          wire.flags,       {wire.epoch, wire.counter}, wire.generation,
                             wire.payload_bytes,  wire.piece_count, wire.payload_crc32c};
    check_lengths(header, limit);
    return header;
}

}  // namespace kvstore::net
