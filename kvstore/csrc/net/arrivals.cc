#include "arrivals.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"

namespace kvstore::net {
namespace {

[[noreturn]] void refuse(const std::string& message) {
    throw NetError(Fault::protocol, "a DATA frame " + message);
}

}  // namespace

Arrivals::Arrivals(std::uint32_t record_count) : records_(record_count) {}

void Arrivals::add_record(std::uint32_t number, RecordPlace place) {
    const std::scoped_lock lock(lock_);
    if (number >= records_.size() || records_[number] != nullptr || place.address == nullptr) {
        throw std::invalid_argument("record " + std::to_string(number) + " cannot be added: out of range, or twice");
    }
    auto record = std::make_unique<Record>();
    record->pieces.assign(place.layout->piece_count(), State::missing);
    record->left = static_cast<std::uint32_t>(place.layout->piece_count());
    record->place = std::move(place);
    records_[number] = std::move(record);
}

void Arrivals::attach(TransferId transfer, std::uint64_t generation, std::uint64_t window_bytes) {
    const std::scoped_lock lock(lock_);
    transfer_ = transfer;
    generation_ = generation;
    window_bytes_ = granted_bytes_ = window_bytes;
    claimed_bytes_ = consumed_bytes_ = 0;
}

bool Arrivals::is_current(TransferId transfer, std::uint64_t generation) const {
    const std::scoped_lock lock(lock_);
    return transfer == transfer_ && generation == generation_;
}

Arrivals::Record* Arrivals::find(std::uint32_t number) const {
    return number < records_.size() ? records_[number].get() : nullptr;
}

void Arrivals::check_row(const PieceRow& row) const {
    const Record* record = find(row.record);
    const std::string which = "has pieces of record " + std::to_string(row.record);
    if (record == nullptr) {
        refuse(which + ", which was not wanted");
    }
    if (row.piece >= record->pieces.size()) {
        refuse("has piece " + std::to_string(row.piece) + " of record " + std::to_string(row.record) +
               ", which has fewer");
    }
    const State state = record->pieces[row.piece];
    if (state == State::arriving || state == State::arrived) {
        refuse(which + " that had arrived before");
    }
    if (row.size_bytes != record->place.layout->sizes[row.piece]) {
        refuse(which + " of another size than the spec says");
    }
}

void Arrivals::claim(std::span<const PieceRow> rows, std::optional<std::uint64_t> body_bytes) {
    std::uint64_t total = 0;
    for (const PieceRow& row : rows) {
        total += row.size_bytes;
    }
    const std::scoped_lock lock(lock_);
    if (claimed_bytes_ + total > granted_bytes_) {
        refuse("of " + std::to_string(total) + " bytes exceeds the credit: " + std::to_string(claimed_bytes_) +
               " of " + std::to_string(granted_bytes_) + " bytes are used");
    }
    if (body_bytes && total != *body_bytes) {
        refuse("carries " + std::to_string(*body_bytes) + " bytes, its table says otherwise");
    }
    std::vector<State> before;
    before.reserve(rows.size());
    try {
        for (const PieceRow& row : rows) {
            check_row(row);
            State& state = records_[row.record]->pieces[row.piece];
            before.push_back(state);
            state = State::arriving;
        }
    } catch (const NetError&) {
        for (std::size_t i = 0; i < before.size(); ++i) {
            records_[rows[i].record]->pieces[rows[i].piece] = before[i];
        }
        throw;
    }
    claimed_bytes_ += total;
}

void Arrivals::lose(std::span<const PieceRow> rows, std::uint64_t consumed_bytes) {
    const std::scoped_lock lock(lock_);
    for (const PieceRow& row : rows) {
        records_[row.record]->pieces[row.piece] = State::missing;
        claimed_bytes_ -= row.size_bytes;
    }
    consumed_bytes_ -= consumed_bytes;
}

Settled Arrivals::settle(std::span<const PieceRow> rows, std::span<const std::uint32_t> computed) {
    Settled settled;
    const std::scoped_lock lock(lock_);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const PieceRow& row = rows[i];
        Record& record = *records_[row.record];
        if (computed[i] != row.crc32c) {
            record.pieces[row.piece] = State::asked_again;
            counts_.damaged += 1;
            settled.damaged.push_back(row);
            continue;
        }
        record.pieces[row.piece] = State::arrived;
        record.place.set_checksum(row.piece, row.crc32c);
        record.left -= 1;
        counts_.pieces += 1;
        counts_.bytes += row.size_bytes;
        if (record.left == 0 && record.is_seal_known) {
            settled.completed.push_back(row.record);
        }
    }
    return settled;
}

std::optional<std::uint64_t> Arrivals::consume(std::uint64_t size_bytes, bool is_quiet) {
    const std::scoped_lock lock(lock_);
    consumed_bytes_ += size_bytes;
    const std::uint64_t granted = consumed_bytes_ + window_bytes_;
    if (!is_quiet && granted < granted_bytes_ + window_bytes_ / 4) {
        return std::nullopt;
    }
    granted_bytes_ = std::max(granted_bytes_, granted);
    return granted_bytes_;
}

std::uint64_t Arrivals::grant_window() {
    const std::scoped_lock lock(lock_);
    granted_bytes_ = std::max(granted_bytes_, consumed_bytes_ + window_bytes_);
    return granted_bytes_;
}

std::uint64_t Arrivals::consumed_bytes() const {
    const std::scoped_lock lock(lock_);
    return consumed_bytes_;
}

std::vector<std::uint32_t> Arrivals::note_seals(std::span<const std::uint32_t> records) {
    std::vector<std::uint32_t> complete;
    const std::scoped_lock lock(lock_);
    for (const std::uint32_t number : records) {
        Record* found = find(number);
        if (found != nullptr) {
            found->is_seal_known = true;
            if (found->left == 0) {
                complete.push_back(number);
            }
        }
    }
    return complete;
}

bool Arrivals::is_complete(std::uint32_t record) const {
    const std::scoped_lock lock(lock_);
    const Record* found = find(record);
    return found != nullptr && found->is_seal_known && found->left == 0;
}

Pending Arrivals::pending(std::uint32_t record) const {
    const std::scoped_lock lock(lock_);
    Pending pending{0, 0, false};
    if (const Record* found = find(record)) {
        pending.is_seal_known = found->is_seal_known;
        pending.pieces = found->left;
        for (const State state : found->pieces) {
            pending.unasked += state == State::missing ? 1 : 0;
        }
    }
    return pending;
}

std::vector<PieceRange> Arrivals::missing_ranges() const {
    std::vector<PieceRange> ranges;
    const std::scoped_lock lock(lock_);
    for (std::uint32_t number = 0; number < records_.size(); ++number) {
        const Record* record = records_[number].get();
        if (record == nullptr || record->left == 0) {
            continue;
        }
        bool is_open = false;
        for (std::uint32_t piece = 0; piece < record->pieces.size(); ++piece) {
            const State state = record->pieces[piece];
            const bool is_missing = state == State::missing || state == State::asked_again;
            if (is_missing && is_open) {
                ranges.back().count += 1;
            } else if (is_missing) {
                ranges.push_back({number, piece, 1});
            }
            is_open = is_missing;
        }
    }
    return ranges;
}

ArrivalCounts Arrivals::counts() const {
    const std::scoped_lock lock(lock_);
    return counts_;
}

}  // namespace kvstore::net
