// What one transfer's receiver knows of its pieces: wanted, on the way, arrived; and how many bytes may be in flight.
//
// Any thread may call anything; several connections of one transfer share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "frame.h"
#include "record_table.h"

namespace kvstore::net {

struct PieceRange {
    std::uint32_t record;
    std::uint32_t first;
    std::uint32_t count;
};

// What became of the pieces of a frame.
struct Settled {
    std::vector<PieceRow> damaged;         // to be asked for again
    std::vector<std::uint32_t> completed;  // records whose last piece arrived after their SEAL
};

// What is left of a record that is not complete.
struct Pending {
    std::uint32_t pieces;   // that have not arrived
    std::uint32_t unasked;  // of these, pieces that are neither on the way nor asked for again
    bool is_seal_known;
};

struct ArrivalCounts {
    std::uint64_t bytes;
    std::uint64_t pieces;
    std::uint64_t damaged;
};

class Arrivals {
  public:
    // `record_count` records were offered, of which `places` are wanted, by their number in the offer.
    explicit Arrivals(std::uint32_t record_count);
    void add_record(std::uint32_t number, RecordPlace place);

    // A connection has attached: frames of another generation are refused from here on, and credit counts anew.
    void attach(TransferId transfer, std::uint64_t generation, std::uint64_t window_bytes);
    bool is_current(TransferId transfer, std::uint64_t generation) const;

    // Checks a piece table against what is wanted and granted, and marks its pieces as on the way.
    // `body_bytes`: what the frame carries; nothing if the pieces are got otherwise.
    // Throws NetError(protocol); nothing is marked then.
    void claim(std::span<const PieceRow> rows, std::optional<std::uint64_t> body_bytes);
    // These pieces did not arrive after all; `consumed_bytes` of them had been counted.
    void lose(std::span<const PieceRow> rows, std::uint64_t consumed_bytes);
    // These pieces have arrived, with these checksums; those that do not hold are missing again.
    Settled settle(std::span<const PieceRow> rows, std::span<const std::uint32_t> computed);

    // Counts received bytes. Returns the new grant when one is due: a quarter of the window, or `is_quiet`.
    std::optional<std::uint64_t> consume(std::uint64_t size_bytes, bool is_quiet);
    // Grants the whole window anew, for pieces that are asked for again.
    std::uint64_t grant_window();
    std::uint64_t consumed_bytes() const;

    // SEAL of records; those of them that were wanted and are all there.
    std::vector<std::uint32_t> note_seals(std::span<const std::uint32_t> records);
    // True when a record is complete: every piece is there, and its SEAL.
    bool is_complete(std::uint32_t record) const;
    Pending pending(std::uint32_t record) const;
    std::vector<PieceRange> missing_ranges() const;
    ArrivalCounts counts() const;

    // REQUIRES: the piece was claimed.
    std::byte* address(const PieceRow& row) const { return records_[row.record]->place.piece(row.piece); }

  private:
    enum class State : std::uint8_t { missing, asked_again, arriving, arrived };
    struct Record {
        RecordPlace place;
        std::vector<State> pieces;
        std::uint32_t left = 0;
        bool is_seal_known = false;
    };
    void check_row(const PieceRow& row) const;
    Record* find(std::uint32_t number) const;

    mutable std::mutex lock_;
    std::vector<std::unique_ptr<Record>> records_;  // by number; empty for those that were not wanted
    TransferId transfer_;
    std::uint64_t generation_ = 0;
    std::uint64_t window_bytes_ = 0;
    std::uint64_t granted_bytes_ = 0;
    std::uint64_t claimed_bytes_ = 0;
    std::uint64_t consumed_bytes_ = 0;
    ArrivalCounts counts_{};
};

}  // namespace kvstore::net
