#include "receive_pieces.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>

#include "../checksum/crc32c.h"
#include "error.h"

namespace kvstore::net {
namespace {

// What is received at once is checksummed while it is in the cache.
constexpr std::size_t chunk_bytes = 256 * kib;
constexpr std::size_t parts_max = 64;
// A side that has sent nothing for this share of the no-progress deadline gives a sign of life.
constexpr double keepalive_fraction = 0.1;

// Sends CREDIT when bytes that arrived make it due.
class Creditor {
  public:
    Creditor(Stream& control, Arrivals& arrivals, const ReceiveOrder& order)
        : control_(control), arrivals_(arrivals), order_(order) {}

    void consumed(std::size_t size_bytes) {
        const std::chrono::duration<double> quiet = Clock::now() - control_.last_sent();
        const bool is_quiet = quiet.count() >= control_.progress_deadline_s() * keepalive_fraction;
        if (const auto granted = arrivals_.consume(size_bytes, is_quiet)) {
            send(*granted);
        }
    }

  private:
    void send(std::uint64_t granted) {
        std::array<std::uint64_t, 2> payload{granted, arrivals_.consumed_bytes()};
        FrameHeader header;
        header.kind = Kind::credit;
        header.transfer = order_.transfer;
        header.generation = order_.generation;
        header.payload_bytes = sizeof(payload);
        header.payload_crc32c = crc32c(payload.data(), sizeof(payload));
        HeaderBytes packed = pack_header(header);
        std::array<iovec, 2> parts{iovec{packed.data(), packed.size()}, iovec{payload.data(), sizeof(payload)}};
        control_.send(parts);
    }

    Stream& control_;
    Arrivals& arrivals_;
    const ReceiveOrder& order_;
};

// The pieces of one frame, filled in the order of its table and checksummed as they fill.
class Body {
  public:
    Body(const Arrivals& arrivals, std::span<const PieceRow> rows, bool is_verified)
        : arrivals_(arrivals), rows_(rows), is_verified_(is_verified) {
        computed_.reserve(rows.size());
    }

    bool is_whole() const { return computed_.size() == rows_.size(); }
    const std::vector<std::uint32_t>& computed() const { return computed_; }

    // Where the next bytes go, neighbours joined.
    std::span<iovec> targets() {
        std::size_t count = 0;
        std::size_t total = 0;
        std::size_t offset = filled_;
        for (std::size_t i = computed_.size(); i < rows_.size() && total < chunk_bytes; ++i, offset = 0) {
            std::byte* begin = arrivals_.address(rows_[i]) + offset;
            const std::size_t size = std::min<std::size_t>(rows_[i].size_bytes - offset, chunk_bytes - total);
            if (count != 0 && end_of(parts_[count - 1]) == begin) {
                parts_[count - 1].iov_len += size;
            } else if (count == parts_.size()) {
                break;
            } else {
                parts_[count++] = {begin, size};
            }
            total += size;
        }
        return {parts_.data(), count};
    }

    void filled(std::size_t size_bytes) {
        while (size_bytes != 0) {
            const PieceRow& row = rows_[computed_.size()];
            const std::size_t taken = std::min<std::size_t>(size_bytes, row.size_bytes - filled_);
            checksum_ = is_verified_ ? function_(arrivals_.address(row) + filled_, taken, checksum_) : row.crc32c;
            filled_ += taken;
            size_bytes -= taken;
            if (filled_ == row.size_bytes) {
                computed_.push_back(checksum_);
                checksum_ = 0;
                filled_ = 0;
            }
        }
    }

  private:
    static std::byte* end_of(const iovec& part) { return static_cast<std::byte*>(part.iov_base) + part.iov_len; }

    const Arrivals& arrivals_;
    const std::span<const PieceRow> rows_;
    const bool is_verified_;
    const Crc32cFunction function_ = active_crc32c_path().function;
    std::vector<std::uint32_t> computed_;
    std::size_t filled_ = 0;  // of the piece after the computed ones
    std::uint32_t checksum_ = 0;
    std::array<iovec, parts_max> parts_;
};

std::vector<PieceRow> receive_table(Stream& stream, const FrameHeader& header) {
    std::vector<PieceRow> rows(header.piece_count);
    stream.receive(rows.data(), header.table_bytes());
    if (crc32c(rows.data(), header.table_bytes()) != header.payload_crc32c) {
        throw NetError(Fault::protocol, "the payload of a DATA frame is damaged: its checksum does not hold");
    }
    return rows;
}

Settled receive_body(Stream& stream, Arrivals& arrivals, std::span<const PieceRow> rows, bool is_verified,
                     Creditor& creditor) {
    std::uint64_t consumed = 0;
    Body body(arrivals, rows, is_verified);
    try {
        SliceClock slices(stream);
        while (!body.is_whole()) {
            const std::size_t received = slices.receive_some(body.targets());
            body.filled(received);
            consumed += received;
            creditor.consumed(received);
        }
    } catch (...) {
        arrivals.lose(rows, consumed);
        throw;
    }
    return arrivals.settle(rows, body.computed());
}

Clock::duration duration_of(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

Received receive_pieces(Stream& stream, Stream& control, Arrivals& arrivals, const ReceiveOrder& order,
                        const std::atomic<bool>& stop) {
    Received result;
    Creditor creditor(control, arrivals, order);
    while (true) {
        if (stop.load(std::memory_order_acquire)) {
            result.event = Arrival::stopped;
            return result;
        }
        if (!stream.wait_readable(Clock::now() + duration_of(order.linger_s))) {
            result.event = Arrival::idle;
            return result;
        }
        const HeaderBytes bytes = stream.receive_header(Clock::now() + duration_of(stream.progress_deadline_s()));
        const FrameHeader header = parse_header(bytes);
        // Whom a frame is meant for is known before a byte of its payload is received.
        if (header.kind != Kind::data || header.flags != 0 || header.transfer != order.transfer ||
            header.generation != order.generation || !arrivals.is_current(order.transfer, order.generation)) {
            result.event = Arrival::control;
            result.header = bytes;
            return result;
        }
        std::vector<PieceRow> rows = receive_table(stream, header);
        if (Clock::now() >= order.transfer_deadline) {
            result.event = Arrival::overdue;
            result.unread_bytes = header.body_bytes();
            return result;
        }
        try {
            arrivals.claim(rows, header.body_bytes());
        } catch (const NetError& error) {
            result.event = Arrival::refused;
            result.reason = error.what();
            result.unread_bytes = header.body_bytes();
            return result;
        }
        result.settled = receive_body(stream, arrivals, rows, order.is_verified, creditor);
        stream.count_frame();
        if (order.is_observed || !result.settled.damaged.empty() || !result.settled.completed.empty()) {
            result.event = Arrival::progress;
            if (order.is_observed) {
                result.rows = std::move(rows);
            }
            return result;
        }
    }
}

}  // namespace kvstore::net
