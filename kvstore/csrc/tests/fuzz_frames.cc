// A peer that sends anything: the receiving loop takes each input as a stream of frames for one transfer.
//
// With libFuzzer: clang++ -fsanitize=fuzzer,address,undefined -DKVSTORE_LIBFUZZER fuzz_frames.cc and the core. Without
// it, the program makes its own inputs from a seed: fuzz_frames [SEED] [ITERATIONS].
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "../checksum/crc32c.h"
#include "../net/arrivals.h"
#include "../net/error.h"
#include "../net/receive_pieces.h"
#include "check.h"

using namespace kvstore;
using kvstore::testing::check;

namespace {

constexpr net::TransferId transfer{1, 2};
constexpr std::uint64_t generation = 3;
constexpr std::uint32_t record_count = 3;
constexpr std::uint32_t piece_count = 5;
constexpr std::uint32_t piece_bytes = 40;
constexpr std::size_t record_bytes = piece_count * (piece_bytes + sizeof(std::uint32_t));

void receive(std::span<const std::uint8_t> input) {
    auto layout = std::make_shared<net::PieceLayout>();
    for (std::uint32_t piece = 0; piece < piece_count; ++piece) {
        layout->offsets.push_back(std::uint64_t{piece} * piece_bytes);
        layout->sizes.push_back(piece_bytes);
    }
    layout->checksum_offset = piece_count * piece_bytes;
    // One allocation per record, so that a sanitizer sees a byte outside of it.
    std::array<std::unique_ptr<std::byte[]>, record_count> memory;
    net::Arrivals arrivals(record_count + 1);
    for (std::uint32_t record = 0; record < record_count; ++record) {
        memory[record] = std::make_unique<std::byte[]>(record_bytes);
        arrivals.add_record(record, {layout, memory[record].get()});
    }
    arrivals.attach(transfer, generation, 1000);

    std::array<int, 2> ends{};
    check(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) == 0, "socketpair");
    net::Stream peer(ends[0], "the target", 10.0);
    net::Stream stream(ends[1], "the fuzzer", 10.0);
    std::vector<std::uint8_t> bytes(input.begin(), input.end());
    iovec part{bytes.data(), bytes.size()};
    peer.send({&part, bytes.empty() ? std::size_t{0} : std::size_t{1}});
    ::shutdown(ends[0], SHUT_WR);
    net::ReceiveOrder order;
    order.transfer = transfer;
    order.generation = generation;
    order.transfer_deadline = net::Clock::now() + std::chrono::hours(1);
    order.linger_s = 10.0;
    const std::atomic<bool> stop{false};
    try {
        while (true) {
            const net::Received received = net::receive_pieces(stream, stream, arrivals, order, stop);
            if (received.event == net::Arrival::control || received.event == net::Arrival::refused) {
                const std::uint64_t unread = received.event == net::Arrival::refused
                                                 ? received.unread_bytes
                                                 : net::parse_header(received.header).payload_bytes;
                std::vector<std::byte> scratch(unread);
                stream.receive(scratch.data(), scratch.size());
            }
        }
    } catch (const net::NetError&) {
    }
    // Nothing is left in between: each piece is missing, asked for again or there, and what is there is intact.
    for (std::uint32_t record = 0; record < record_count; ++record) {
        check(arrivals.pending(record).unasked <= arrivals.pending(record).pieces, "pieces are accounted for");
    }
    std::array<std::array<bool, piece_count>, record_count> is_missing{};
    for (const net::PieceRange& range : arrivals.missing_ranges()) {
        for (std::uint32_t piece = range.first; piece < range.first + range.count; ++piece) {
            is_missing[range.record][piece] = true;
        }
    }
    for (std::uint32_t record = 0; record < record_count; ++record) {
        const net::RecordPlace place{layout, memory[record].get()};
        for (std::uint32_t piece = 0; piece < piece_count; ++piece) {
            check(is_missing[record][piece] || crc32c(place.piece(piece), piece_bytes) == place.checksum(piece),
                  "what has arrived is intact");
        }
    }
}

#ifndef KVSTORE_LIBFUZZER

// A stream of mostly sensible frames, some of them damaged.
class Inputs {
  public:
    explicit Inputs(std::uint32_t seed) : generator_(seed) {}

    std::vector<std::uint8_t> next() {
        std::vector<std::uint8_t> stream;
        for (std::uint32_t frames = below(6); frames != 0; --frames) {
            append(stream, one_of(10) ? noise(below(200)) : frame());
        }
        if (one_of(4) && !stream.empty()) {
            stream[below(static_cast<std::uint32_t>(stream.size()))] ^= static_cast<std::uint8_t>(1U << below(8));
        }
        if (one_of(5)) {
            stream.resize(below(static_cast<std::uint32_t>(stream.size()) + 1));
        }
        return stream;
    }

  private:
    std::uint32_t below(std::uint32_t limit) { return limit == 0 ? 0 : static_cast<std::uint32_t>(generator_() % limit); }
    bool one_of(std::uint32_t chances) { return below(chances) == 0; }
    static void append(std::vector<std::uint8_t>& to, const std::vector<std::uint8_t>& what) {
        to.insert(to.end(), what.begin(), what.end());
    }
    std::vector<std::uint8_t> noise(std::uint32_t size) {
        std::vector<std::uint8_t> bytes(size);
        std::generate(bytes.begin(), bytes.end(), [this] { return static_cast<std::uint8_t>(generator_()); });
        return bytes;
    }

    std::vector<std::uint8_t> frame() {
        std::vector<net::PieceRow> rows(1 + below(4));
        std::vector<std::uint8_t> body;
        for (net::PieceRow& row : rows) {
            row = {below(one_of(20) ? 1000 : record_count), below(one_of(20) ? 1000 : piece_count), piece_bytes, 0};
            if (one_of(20)) {
                row.size_bytes = below(2 * piece_bytes);
            }
            const std::vector<std::uint8_t> bytes = noise(row.size_bytes);
            row.crc32c = one_of(5) ? 1 : crc32c(bytes.data(), bytes.size());
            append(body, bytes);
        }
        net::FrameHeader header;
        header.kind = one_of(8) ? net::Kind::ping : net::Kind::data;
        header.transfer = one_of(15) ? net::TransferId{1, 9} : transfer;
        header.generation = one_of(15) ? generation + 1 : generation;
        if (header.kind == net::Kind::data) {
            header.piece_count = static_cast<std::uint32_t>(rows.size());
            header.payload_bytes = static_cast<std::uint32_t>(header.table_bytes() + body.size());
            header.payload_crc32c = crc32c(rows.data(), header.table_bytes());
        }
        std::vector<std::uint8_t> bytes(net::frame_header_bytes);
        try {
            const net::HeaderBytes packed = net::pack_header(header);
            std::memcpy(bytes.data(), packed.data(), packed.size());
        } catch (const net::NetError&) {
            return noise(64);
        }
        if (one_of(12)) {
            bytes[4 + below(56)] = static_cast<std::uint8_t>(generator_());
            // An intact header with odd fields gets past the checksum.
            const std::uint32_t crc = crc32c(bytes.data(), 60);
            std::memcpy(bytes.data() + 60, &crc, sizeof(crc));
        }
        if (header.kind == net::Kind::data) {
            const auto* table = reinterpret_cast<const std::uint8_t*>(rows.data());
            bytes.insert(bytes.end(), table, table + header.table_bytes());
            append(bytes, body);
        }
        return bytes;
    }

    std::mt19937 generator_;
};

#endif

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    receive({data, std::min<std::size_t>(size, 64 << 10)});
    return 0;
}

#ifndef KVSTORE_LIBFUZZER
int main(int argc, char** argv) {
    const auto seed = static_cast<std::uint32_t>(argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1);
    const unsigned long iterations = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 3000;
    Inputs inputs(seed);
    for (unsigned long i = 0; i < iterations; ++i) {
        const std::vector<std::uint8_t> input = inputs.next();
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::cout << iterations << " streams from seed " << seed << "\n";
}
#endif
