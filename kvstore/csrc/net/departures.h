// What is left to send of one transfer: which pieces are whole, which the receiver wants, which seals are due.
//
// Any thread may call anything; several connections of one transfer take their frames from it, a slow one fewer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <set>
#include <span>
#include <vector>

#include "arrivals.h"
#include "frame.h"
#include "record_table.h"

namespace kvstore::net {

// The pieces of one DATA frame, by record and piece.
struct Departing {
    std::vector<PieceRow> rows;
    std::uint64_t body_bytes = 0;
    bool is_remote = false;  // they are named only: the receiver gets them
};

struct DueSeal {
    std::uint32_t record;
    std::uint64_t cost_us;
};

struct TakeLimits {
    std::uint64_t frame_bytes_max;
    bool is_remote;            // pieces of sealed records are named only
    std::uint32_t connection;  // 0 is the first one of an attachment; what others took can be lost with them
};

class Departures {
  public:
    explicit Departures(std::vector<RecordPlace> records);

    // Reports of the source
    void pieces_whole(std::uint32_t record, std::span<const std::uint32_t> pieces);
    // All pieces of a record are whole.
    void record_sealed(std::uint32_t record, std::uint64_t cost_us);

    // Records `first` and on are there as a whole, at these costs.
    void records_complete(std::uint32_t first, std::span<const std::uint64_t> costs_us);

    // What the receiver lacks: in all (an attachment begins), or in addition. Returns the number of pieces.
    // Throws NetError(protocol): a record or piece that was not offered.
    std::uint64_t want(std::span<const PieceRange> ranges, bool is_again);
    // Piece bytes that may be sent in this attachment; only grows.
    void grant(std::uint64_t granted_bytes);

    // The next frame: at most `frame_bytes_max` of pieces unless one is larger, and never above the credit. No rows
    // when nothing can be sent. A record that is still being written is never named as remote, since its slot holds
    // what was there before. The frame counts as being sent until `sent` or `unsent`.
    Departing take(const TakeLimits& limits);
    void sent(const Departing& frame);
    // It did not leave; its pieces are wanted again unless `connection` is lost as a whole, which says so later.
    void unsent(const Departing& frame, std::uint32_t connection);
    // Of what a further connection took, only this many frames have arrived. Returns the pieces wanted again.
    // Throws NetError(protocol): more than was taken.
    std::uint64_t lost(std::uint32_t connection, std::uint64_t frames_arrived);

    // Whether `take` would find something, without a limit on a frame's bytes.
    bool has_sendable() const;
    // Bytes of the wanted pieces that were not taken.
    std::uint64_t left_bytes() const;
    // Whether wanted pieces or seals have not been sent, ready or not.
    bool has_left() const;
    std::vector<DueSeal> next_seals(std::size_t count_max);
    std::uint64_t pieces_sent() const;
    std::vector<std::uint64_t> bytes_sent_by_record() const;

    const RecordPlace& place(std::uint32_t record) const { return records_[record].place; }

  private:
    struct Record {
        RecordPlace place;
        std::vector<std::uint8_t> whole;
        std::vector<std::uint8_t> wanted;
        std::uint32_t wanted_left = 0;
        std::uint64_t cost_us = 0;
        std::uint64_t sent_bytes = 0;
        bool is_sealed = false;
        bool is_ready = false;
        bool was_wanted = false;
        bool is_unsealed = false;  // its SEAL has not been sent in this attachment
    };
    struct Taken {
        std::vector<std::vector<PieceRow>> frames;
    };
    std::uint64_t want_range(const PieceRange& range);
    void want_pieces(std::span<const PieceRow> rows);
    void check_due(std::uint32_t number);
    void enqueue(std::uint32_t number);

    mutable std::mutex lock_;
    std::vector<Record> records_;
    std::set<std::uint32_t> due_;
    std::deque<std::uint32_t> ready_;
    std::vector<Taken> taken_;  // by connection, from 1
    std::uint64_t left_ = 0;
    std::uint64_t left_bytes_ = 0;
    std::uint64_t unsealed_ = 0;
    std::uint64_t granted_bytes_ = 0;
    std::uint64_t used_bytes_ = 0;
    std::uint64_t frames_under_way_ = 0;
    std::uint64_t pieces_sent_ = 0;
};

}  // namespace kvstore::net
