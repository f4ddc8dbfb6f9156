#include "send_pieces.h"

#include <utility>
#include <vector>

#include "../checksum/crc32c.h"

namespace kvstore::net {
namespace {

void send_frame(Stream& stream, const Departures& departures, const SendOrder& order, Departing& frame) {
    FrameHeader header;
    header.kind = Kind::data;
    header.transfer = order.transfer;
    header.generation = order.generation;
    header.piece_count = static_cast<std::uint32_t>(frame.rows.size());
    header.payload_bytes = static_cast<std::uint32_t>(header.table_bytes() + frame.body_bytes);
    header.payload_crc32c = crc32c(frame.rows.data(), header.table_bytes());
    HeaderBytes packed = pack_header(header);

    std::vector<iovec> parts;
    parts.reserve(frame.rows.size() + 2);
    parts.push_back({packed.data(), packed.size()});
    parts.push_back({frame.rows.data(), header.table_bytes()});
    const std::byte* end = nullptr;
    for (const PieceRow& row : frame.rows) {
        std::byte* begin = departures.place(row.record).piece(row.piece);
        if (begin == end) {
            parts.back().iov_len += row.size_bytes;
        } else {
            parts.push_back({begin, row.size_bytes});
        }
        end = begin + row.size_bytes;
    }
    stream.send(parts);
}

}  // namespace

Sent send_pieces(Stream& stream, Departures& departures, Traffic::Flow& flow, const SendOrder& order,
                 const std::atomic<bool>& stop) {
    Sent result;
    Traffic::Seat seat(flow, &stream, order.unsent_bytes_max);
    while (!stop.load(std::memory_order_acquire) && Clock::now() < order.until) {
        if (seat.is_contended() && !departures.has_sendable()) {
            seat.leave();
            break;
        }
        const std::uint64_t room = seat.wait_turn(order.frame_bytes_max, order.until, stop);
        if (room == 0) {
            result.is_held = true;
            break;
        }
        Departing frame = departures.take({room, false, order.connection});
        if (frame.rows.empty()) {
            seat.leave();
            break;
        }
        try {
            send_frame(stream, departures, order, frame);
        } catch (...) {
            departures.unsent(frame, order.connection);
            seat.leave();
            throw;
        }
        seat.sent(frame.body_bytes);
        departures.sent(frame);
        if (result.frames == 0) {
            result.first_frame = Clock::now();
        }
        result.frames += 1;
        if (order.is_observed) {
            result.last = std::move(frame);
            break;
        }
    }
    return result;
}

}  // namespace kvstore::net
