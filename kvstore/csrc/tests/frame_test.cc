#include "../net/frame.h"

#include <array>
#include <cstring>
#include <string>

#include "../checksum/crc32c.h"
#include "../net/error.h"
#include "check.h"

using namespace kvstore;
using kvstore::testing::check;
using kvstore::testing::throws;

namespace {

net::FrameHeader data_header(std::uint32_t pieces, std::uint32_t body_bytes, std::uint8_t flags = 0) {
    net::FrameHeader header;
    header.kind = net::Kind::data;
    header.flags = flags;
    header.transfer = {7, 9};
    header.generation = 3;
    header.piece_count = pieces;
    header.payload_bytes = static_cast<std::uint32_t>(pieces * net::piece_row_bytes) + body_bytes;
    return header;
}

// The example of docs/protocol.md.
void test_documented_header() {
    net::FrameHeader header;
    header.kind = net::Kind::credit;
    header.transfer = {0x0123456789abcdef, 5};
    header.generation = 2;
    header.payload_bytes = 16;
    header.payload_crc32c = 0x11223344;
    const net::HeaderBytes bytes = net::pack_header(header);
    const std::array<unsigned char, 8> begin{0x4b, 0x56, 0x53, 0x54, 0x01, 0x00, 0x07, 0x00};
    const std::array<unsigned char, 4> end{0x84, 0x6e, 0xfb, 0x08};
    check(std::memcmp(bytes.data(), begin.data(), begin.size()) == 0, "the header begins as documented");
    check(std::memcmp(bytes.data() + 60, end.data(), end.size()) == 0, "its checksum is the documented one");
    const net::FrameHeader parsed = net::parse_header(bytes);
    check(parsed.kind == header.kind && parsed.transfer == header.transfer && parsed.generation == 2, "it round-trips");
}

void test_every_flipped_bit_is_noticed() {
    const net::HeaderBytes intact = net::pack_header(data_header(2, 100));
    for (std::size_t bit = 0; bit < intact.size() * 8; ++bit) {
        net::HeaderBytes damaged = intact;
        damaged[bit / 8] ^= std::byte{1} << (bit % 8);
        check(throws<net::NetError>([&] { net::parse_header(damaged); }, ""), "bit " + std::to_string(bit));
    }
}

void test_limits() {
    const auto refused = [](const net::FrameHeader& header, const std::string& why) {
        check(throws<net::NetError>([&] { net::pack_header(header); }, why), why);
    };
    refused(data_header(0, 0), "1 to 4096 pieces");
    refused(data_header(4097, 1 << 20), "1 to 4096 pieces");
    refused(data_header(2, 1), "the limit is");
    refused(data_header(1, (64 << 20) + 1), "the limit is");
    refused(data_header(2, 16 << 20), "the limit is");
    refused(data_header(1, 1, net::flag_remote), "just their table");
    refused(data_header(1, 1, 2), "unknown flags");
    net::FrameHeader truncated = data_header(2, 0);
    truncated.payload_bytes = 31;
    refused(truncated, "too few");
    net::FrameHeader credit;
    credit.kind = net::Kind::credit;
    credit.payload_bytes = 17;
    refused(credit, "above its limit");
    credit.payload_bytes = 16;
    credit.piece_count = 1;
    refused(credit, "claims 1 pieces");
    credit.piece_count = 0;
    credit.flags = net::flag_remote;
    refused(credit, "unknown flags");
    net::pack_header(data_header(1, 64 << 20));
    net::pack_header(data_header(3, 0, net::flag_remote));
}

void test_foreign_versions_are_told_from_damage() {
    net::HeaderBytes bytes = net::pack_header(data_header(1, 1));
    bytes[4] = std::byte{2};
    const std::uint32_t crc = crc32c(bytes.data(), 60);
    std::memcpy(bytes.data() + 60, &crc, sizeof(crc));
    try {
        net::parse_header(bytes);
        check(false, "a foreign version is refused");
    } catch (const net::NetError& error) {
        check(error.fault() == net::Fault::mismatch, "a foreign version is no damage");
    }
}

}  // namespace

int main() {
    test_documented_header();
    test_every_flipped_bit_is_noticed();
    test_limits();
    test_foreign_versions_are_told_from_damage();
}
