// Both loops over a socket pair: what is sent arrives bit for bit, whatever rules a peer breaks, and the state that
// several connections share is theirs together (run with a thread sanitizer, too).
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../checksum/crc32c.h"
#include "../net/arrivals.h"
#include "../net/departures.h"
#include "../net/error.h"
#include "../net/receive_pieces.h"
#include "../net/send_pieces.h"
#include "check.h"

using namespace kvstore;
using kvstore::testing::check;
using kvstore::testing::throws;

namespace {

constexpr net::TransferId transfer{11, 1};
constexpr std::uint64_t generation = 4;
constexpr double patience_s = 20;
net::Traffic::Flow flow(std::make_shared<net::Traffic>(), 128, false, false, "the receiver");

net::Moment after(double seconds) {
    return net::Clock::now() + std::chrono::duration_cast<net::Clock::duration>(std::chrono::duration<double>(seconds));
}

// Records of pieces of uneven sizes with gaps between them, and a column of checksums at the end.
class Records {
  public:
    Records(std::size_t count, std::size_t pieces, std::uint32_t piece_bytes) {
        auto layout = std::make_shared<net::PieceLayout>();
        std::uint64_t offset = 64;
        for (std::size_t piece = 0; piece < pieces; ++piece) {
            const auto size = static_cast<std::uint32_t>(piece_bytes + piece);
            layout->offsets.push_back(offset);
            layout->sizes.push_back(size);
            offset += size + (piece % 3 == 0 ? 8 : 0);
        }
        layout->checksum_offset = offset;
        layout_ = layout;
        record_bytes_ = offset + pieces * sizeof(std::uint32_t);
        memory_.resize(count * record_bytes_);
    }

    std::size_t count() const { return memory_.size() / record_bytes_; }
    std::vector<net::RecordPlace> places() {
        std::vector<net::RecordPlace> places;
        for (std::size_t record = 0; record < count(); ++record) {
            places.push_back({layout_, memory_.data() + record * record_bytes_});
        }
        return places;
    }
    void fill(unsigned seed) {
        std::mt19937 generator(seed);
        for (std::byte& byte : memory_) {
            byte = static_cast<std::byte>(generator());
        }
        for (const net::RecordPlace& place : places()) {
            for (std::size_t piece = 0; piece < layout_->piece_count(); ++piece) {
                place.set_checksum(piece, crc32c(place.piece(piece), layout_->sizes[piece]));
            }
        }
    }
    bool has_pieces_of(Records& other) {
        const auto ours = places();
        const auto theirs = other.places();
        for (std::size_t record = 0; record < ours.size(); ++record) {
            for (std::size_t piece = 0; piece < layout_->piece_count(); ++piece) {
                if (ours[record].checksum(piece) != theirs[record].checksum(piece) ||
                    std::memcmp(ours[record].piece(piece), theirs[record].piece(piece), layout_->sizes[piece]) != 0) {
                    return false;
                }
            }
        }
        return true;
    }
    std::size_t piece_count() const { return layout_->piece_count(); }
    std::vector<net::PieceRange> ranges() const {
        std::vector<net::PieceRange> ranges;
        for (std::uint32_t record = 0; record < count(); ++record) {
            ranges.push_back({record, 0, static_cast<std::uint32_t>(layout_->piece_count())});
        }
        return ranges;
    }

  private:
    std::shared_ptr<const net::PieceLayout> layout_;
    std::size_t record_bytes_ = 0;
    std::vector<std::byte> memory_;
};

struct Pair {
    std::unique_ptr<net::Stream> sender;
    std::unique_ptr<net::Stream> receiver;

    explicit Pair(double progress_s = patience_s) {
        std::array<int, 2> ends{};
        check(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) == 0, "socketpair");
        sender = std::make_unique<net::Stream>(ends[0], "the receiver", progress_s);
        receiver = std::make_unique<net::Stream>(ends[1], "the sender", progress_s);
    }
};

struct Target {
    Records records;
    net::Arrivals arrivals;

    explicit Target(const Records& like, std::uint64_t window_bytes)
        : records(like), arrivals(static_cast<std::uint32_t>(like.count())) {
        std::uint32_t number = 0;
        for (const net::RecordPlace& place : records.places()) {
            std::memset(place.address, 0, place.layout->checksum_offset + place.layout->piece_count() * 4);
            arrivals.add_record(number++, place);
        }
        arrivals.attach(transfer, generation, window_bytes);
    }
};

net::ReceiveOrder receive_order(double linger_s = patience_s) {
    net::ReceiveOrder order;
    order.transfer = transfer;
    order.generation = generation;
    order.transfer_deadline = after(3600);
    order.linger_s = linger_s;
    return order;
}

net::SendOrder send_order(std::uint64_t frame_bytes_max, std::uint32_t connection = 0) {
    net::SendOrder order;
    order.transfer = transfer;
    order.generation = generation;
    order.frame_bytes_max = frame_bytes_max;
    order.connection = connection;
    order.until = after(3600);
    return order;
}

// Sends what is left, taking grants from CREDIT, then PING, which ends the receiving loop.
void send_all(net::Stream& stream, net::Departures& departures, std::uint64_t frame_bytes_max) {
    const std::atomic<bool> stop{false};
    net::send_pieces(stream, departures, flow, send_order(frame_bytes_max), stop);
    departures.next_seals(1 << 20);
    while (departures.has_left()) {
        const net::FrameHeader header = net::parse_header(stream.receive_header(after(patience_s)));
        check(header.kind == net::Kind::credit, "the receiver grants");
        std::array<std::uint64_t, 2> payload{};
        stream.receive(payload.data(), sizeof(payload));
        departures.grant(payload[0]);
        net::send_pieces(stream, departures, flow, send_order(frame_bytes_max), stop);
        departures.next_seals(1 << 20);
    }
    net::FrameHeader ping;
    net::HeaderBytes bytes = net::pack_header(ping);
    iovec part{bytes.data(), bytes.size()};
    stream.send({&part, 1});
}

void mark_all_complete(net::Departures& departures, std::size_t count) {
    departures.records_complete(0, std::vector<std::uint64_t>(count, 5));
}

void test_pieces_arrive_bit_for_bit(std::uint32_t piece_bytes, std::uint64_t frame_bytes, std::uint64_t window) {
    Records source(7, 11, piece_bytes);
    source.fill(piece_bytes);
    Target target(source, window);
    net::Departures departures(source.places());
    mark_all_complete(departures, source.count());
    departures.want(source.ranges(), false);
    departures.grant(window);
    Pair pair;
    std::thread sending([&] { send_all(*pair.sender, departures, frame_bytes); });
    const std::atomic<bool> stop{false};
    const net::Received received =
        net::receive_pieces(*pair.receiver, *pair.receiver, target.arrivals, receive_order(), stop);
    sending.join();
    check(received.event == net::Arrival::control, "PING ends the loop");
    check(target.arrivals.missing_ranges().empty(), "nothing is missing");
    check(target.records.has_pieces_of(source), "every byte is the same");
    check(departures.pieces_sent() == source.count() * source.piece_count(), "every piece was sent once");
}

// A DATA frame made by hand.
std::vector<std::byte> frame_of(std::vector<net::PieceRow> rows, net::TransferId id, std::uint64_t frame_generation,
                                std::size_t body_bytes) {
    net::FrameHeader header;
    header.kind = net::Kind::data;
    header.transfer = id;
    header.generation = frame_generation;
    header.piece_count = static_cast<std::uint32_t>(rows.size());
    header.payload_bytes = static_cast<std::uint32_t>(header.table_bytes() + body_bytes);
    header.payload_crc32c = crc32c(rows.data(), header.table_bytes());
    const net::HeaderBytes packed = net::pack_header(header);
    std::vector<std::byte> frame(packed.size() + header.payload_bytes, std::byte{1});
    std::memcpy(frame.data(), packed.data(), packed.size());
    std::memcpy(frame.data() + packed.size(), rows.data(), header.table_bytes());
    return frame;
}

net::Received receive_frame(Target& target, std::vector<std::byte> frame) {
    Pair pair;
    iovec part{frame.data(), frame.size()};
    pair.sender->send({&part, 1});
    pair.sender->close();
    const std::atomic<bool> stop{false};
    return net::receive_pieces(*pair.receiver, *pair.receiver, target.arrivals, receive_order(), stop);
}

void test_rules() {
    const Records like(2, 4, 100);
    const auto refused = [&](std::vector<net::PieceRow> rows, std::size_t body_bytes, const std::string& why) {
        Target target(like, 1 << 20);
        const std::vector<net::PieceRange> before = target.arrivals.missing_ranges();
        const net::Received received = receive_frame(target, frame_of(rows, transfer, generation, body_bytes));
        check(received.event == net::Arrival::refused, why);
        check(received.reason.find(why) != std::string::npos, received.reason);
        check(received.unread_bytes == body_bytes, "the body is unread");
        check(target.arrivals.missing_ranges().size() == before.size(), "nothing is taken");
        check(target.arrivals.pending(0).pieces == 4 && target.arrivals.pending(0).unasked == 4, "all is missing");
    };
    refused({{9, 0, 100, 0}}, 100, "which was not wanted");
    refused({{0, 9, 100, 0}}, 100, "which has fewer");
    refused({{0, 0, 99, 0}}, 99, "another size");
    refused({{0, 0, 100, 0}, {0, 0, 100, 0}}, 200, "arrived before");
    refused({{0, 0, 100, 0}}, 101, "its table says otherwise");

    Target small(like, 50);
    check(receive_frame(small, frame_of({{0, 0, 100, 0}}, transfer, generation, 100)).reason.find("credit") !=
              std::string::npos,
          "more than the credit");

    Target target(like, 1 << 20);
    for (const auto& [id, number] : {std::pair{transfer, generation + 1}, std::pair{net::TransferId{11, 2}, generation}}) {
        const net::Received late = receive_frame(target, frame_of({{0, 0, 100, 0}}, id, number, 100));
        check(late.event == net::Arrival::control && late.unread_bytes == 0, "a late frame is handed over unread");
    }
    // Late in another sense: the attachment itself has moved on.
    target.arrivals.attach(transfer, generation + 1, 1 << 20);
    check(receive_frame(target, frame_of({{0, 0, 100, 0}}, transfer, generation, 100)).event == net::Arrival::control,
          "a frame for an attachment that has ended is handed over unread");
    target.arrivals.attach(transfer, generation, 1 << 20);

    const net::Received damaged = receive_frame(target, frame_of({{0, 1, 101, 0}}, transfer, generation, 101));
    check(damaged.event == net::Arrival::progress && damaged.settled.damaged.size() == 1, "damage is told");
    check(target.arrivals.pending(0).pieces == 4 && target.arrivals.pending(0).unasked == 3, "it is asked for again");
    const std::vector<std::byte> ones(101, std::byte{1});
    const net::PieceRow good{0, 1, 101, crc32c(ones.data(), ones.size())};
    try {
        receive_frame(target, frame_of({good}, transfer, generation, 101));
        check(false, "the stream ends");
    } catch (const net::NetError& error) {
        check(error.fault() == net::Fault::peer_gone, "the stream ends after the good frame");
    }
    check(target.arrivals.pending(0).pieces == 3, "the second try arrived");
    const net::Received twice = receive_frame(target, frame_of({good}, transfer, generation, 101));
    check(twice.event == net::Arrival::refused && twice.reason.find("arrived before") != std::string::npos, "twice");

    std::vector<std::byte> cut = frame_of({{0, 2, 102, 0}}, transfer, generation, 102);
    cut.resize(cut.size() - 50);
    check(throws<net::NetError>([&] { receive_frame(target, cut); }, "closed the connection"), "a cut payload");
    check(target.arrivals.pending(0).unasked == 3, "what was on its way is missing again");

    std::vector<std::byte> bad = frame_of({{0, 2, 102, 0}}, transfer, generation, 102);
    bad[70] ^= std::byte{1};
    check(throws<net::NetError>([&] { receive_frame(target, bad); }, "checksum"), "a damaged table");
    bad[20] ^= std::byte{1};
    check(throws<net::NetError>([&] { receive_frame(target, bad); }, "header is damaged"), "a damaged header");
}

void test_a_stopped_peer_is_noticed() {
    Pair pair(0.2);
    std::vector<std::byte> much(64 << 20);
    iovec part{much.data(), much.size()};
    const net::Moment begin = net::Clock::now();
    check(throws<net::NetError>([&] { pair.sender->send({&part, 1}); }, "took no bytes"), "nobody receives");
    check(net::Clock::now() - begin < std::chrono::seconds(10), "in time");

    Target target(Records(1, 4, 100), 1 << 20);
    Pair half(0.2);
    std::vector<std::byte> frame = frame_of({{0, 0, 100, 0}}, transfer, generation, 100);
    iovec front{frame.data(), frame.size() - 10};
    half.sender->send({&front, 1});
    const std::atomic<bool> stop{false};
    check(throws<net::NetError>(
              [&] { net::receive_pieces(*half.receiver, *half.receiver, target.arrivals, receive_order(), stop); },
              "stopped in the middle"),
          "the rest never comes");
    const net::Received idle = net::receive_pieces(*Pair().receiver, *half.receiver, target.arrivals, receive_order(0),
                                                   std::atomic<bool>{true});
    check(idle.event == net::Arrival::stopped, "told to stop");
}

void test_close_ends_a_wait() {
    Pair pair;
    Target target(Records(1, 1, 100), 1 << 20);
    std::thread closing([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        pair.receiver->close();
    });
    const std::atomic<bool> stop{false};
    check(throws<net::NetError>(
              [&] { net::receive_pieces(*pair.receiver, *pair.receiver, target.arrivals, receive_order(), stop); },
              "closed by this side"),
          "a wait ends");
    closing.join();
    check(throws<net::NetError>([&] { pair.receiver->wait_readable(after(1)); }, "closed by this side"), "it stays so");
}

// Three connections take frames of one transfer; one of them is cut, and what it carried is sent over the others.
void test_connections_share_a_transfer(unsigned seed) {
    Records source(40, 9, 3000);
    source.fill(seed);
    const std::uint64_t window = 200'000;
    Target target(source, window);
    net::Departures departures(source.places());
    mark_all_complete(departures, source.count());
    departures.want(source.ranges(), false);
    departures.grant(window);
    std::array<Pair, 3> pairs;
    const std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        threads.emplace_back([&, i] {
            try {
                while (true) {
                    net::ReceiveOrder order = receive_order();
                    order.is_observed = true;
                    net::receive_pieces(*pairs[i].receiver, *pairs[0].receiver, target.arrivals, order, stop);
                    if (i == 2 && pairs[i].receiver->frames_arrived() == 3) {
                        pairs[i].receiver->close();
                    }
                }
            } catch (const net::NetError& error) {
                check(error.fault() == net::Fault::peer_gone, error.what());
            }
        });
    }
    // The last connection takes all the credit there is, and delivers three frames of it.
    try {
        net::send_pieces(*pairs[2].sender, departures, flow, send_order(20'000, 2), stop);
    } catch (const net::NetError& error) {
        check(error.fault() == net::Fault::peer_gone, error.what());
    }
    threads[2].join();
    check(pairs[2].receiver->frames_arrived() == 3 && departures.lost(2, 3) > 0, "what was lost is wanted again");
    std::thread sending([&] {
        while (departures.has_left()) {
            net::send_pieces(*pairs[1].sender, departures, flow, send_order(20'000, 1), stop);
            departures.next_seals(1000);
            std::this_thread::yield();
        }
    });
    // The first connection reads the credit.
    std::thread crediting([&] {
        try {
            while (true) {
                const net::FrameHeader header = net::parse_header(pairs[0].sender->receive_header(after(patience_s)));
                check(header.kind == net::Kind::credit, "only CREDIT comes");
                std::array<std::uint64_t, 2> payload{};
                pairs[0].sender->receive(payload.data(), sizeof(payload));
                departures.grant(payload[0]);
            }
        } catch (const net::NetError&) {
        }
    });
    const net::Moment until = after(patience_s);
    while (target.arrivals.counts().pieces != source.count() * source.piece_count()) {
        check(net::Clock::now() < until, "everything arrives in time");
        net::send_pieces(*pairs[0].sender, departures, flow, send_order(20'000), stop);
        std::this_thread::yield();
    }
    sending.join();
    for (Pair& pair : pairs) {
        pair.sender->close();
        pair.receiver->close();
    }
    threads[0].join();
    threads[1].join();
    crediting.join();
    check(target.records.has_pieces_of(source), "every byte is the same");
    check(throws<net::NetError>([&] { departures.lost(2, 1'000'000); }, "LOST claims"), "more than was carried");
}

}  // namespace

int main() {
    test_pieces_arrive_bit_for_bit(1, 64, 1 << 20);
    test_pieces_arrive_bit_for_bit(1000, 5000, 6000);
    test_pieces_arrive_bit_for_bit(300'000, 1 << 20, 2 << 20);
    test_pieces_arrive_bit_for_bit(1'500'000, 1 << 20, 4 << 20);
    test_rules();
    test_a_stopped_peer_is_noticed();
    test_close_ends_a_wait();
    for (unsigned seed = 0; seed < 5; ++seed) {
        test_connections_share_a_transfer(seed);
    }
}
