#include "departures.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace kvstore::net {

Departures::Departures(std::vector<RecordPlace> records) : records_(records.size()) {
    for (std::size_t number = 0; number < records.size(); ++number) {
        Record& record = records_[number];
        record.place = std::move(records[number]);
        record.whole.assign(record.place.layout->piece_count(), 0);
        record.wanted.assign(record.place.layout->piece_count(), 0);
    }
}

void Departures::pieces_whole(std::uint32_t record, std::span<const std::uint32_t> pieces) {
    const std::scoped_lock lock(lock_);
    Record& found = records_.at(record);
    for (const std::uint32_t piece : pieces) {
        found.whole.at(piece) = 1;
    }
    enqueue(record);
}

void Departures::record_sealed(std::uint32_t record, std::uint64_t cost_us) {
    const std::scoped_lock lock(lock_);
    Record& found = records_.at(record);
    found.is_sealed = true;
    found.cost_us = cost_us;
    check_due(record);
}

void Departures::records_complete(std::uint32_t first, std::span<const std::uint64_t> costs_us) {
    const std::scoped_lock lock(lock_);
    for (std::size_t i = 0; i < costs_us.size(); ++i) {
        const auto number = static_cast<std::uint32_t>(first + i);
        Record& record = records_.at(number);
        std::fill(record.whole.begin(), record.whole.end(), std::uint8_t{1});
        record.is_sealed = true;
        record.cost_us = costs_us[i];
        enqueue(number);
        check_due(number);
    }
}

std::uint64_t Departures::want(std::span<const PieceRange> ranges, bool is_again) {
    const std::scoped_lock lock(lock_);
    if (!is_again) {
        left_ = left_bytes_ = used_bytes_ = granted_bytes_ = 0;
        due_.clear();
        taken_.clear();
        for (Record& record : records_) {
            std::fill(record.wanted.begin(), record.wanted.end(), std::uint8_t{0});
            record.wanted_left = 0;
        }
    }
    std::uint64_t added = 0;
    for (const PieceRange& range : ranges) {
        added += want_range(range);
    }
    if (!is_again) {
        // A receiver may have all pieces of a record and yet have lost its SEAL with the connection.
        unsealed_ = 0;
        for (std::uint32_t number = 0; number < records_.size(); ++number) {
            records_[number].is_unsealed = records_[number].was_wanted;
            unsealed_ += records_[number].was_wanted ? 1 : 0;
            check_due(number);
        }
    }
    return added;
}

std::uint64_t Departures::want_range(const PieceRange& range) {
    const std::uint64_t stop = std::uint64_t{range.first} + range.count;
    if (range.record >= records_.size() || range.count == 0 || stop > records_[range.record].wanted.size()) {
        throw NetError(Fault::protocol, "WANT names pieces " + std::to_string(range.first) + " to " +
                                            std::to_string(stop) + " of record " + std::to_string(range.record) +
                                            ", never offered");
    }
    Record& record = records_[range.record];
    std::uint32_t added = 0;
    for (std::uint64_t piece = range.first; piece < stop; ++piece) {
        if (record.wanted[piece] == 0) {
            added += 1;
            left_bytes_ += record.place.layout->sizes[piece];
            record.wanted[piece] = 1;
        }
    }
    record.wanted_left += added;
    record.was_wanted = true;
    left_ += added;
    enqueue(range.record);
    return added;
}

void Departures::grant(std::uint64_t granted_bytes) {
    const std::scoped_lock lock(lock_);
    granted_bytes_ = std::max(granted_bytes_, granted_bytes);
}

Departing Departures::take(const TakeLimits& limits) {
    Departing frame;
    const std::scoped_lock lock(lock_);
    const std::uint64_t credit = granted_bytes_ > used_bytes_ ? granted_bytes_ - used_bytes_ : 0;
    const std::uint64_t room = std::min(limits.frame_bytes_max, credit);
    bool is_full = false;
    while (!ready_.empty() && !is_full) {
        const std::uint32_t number = ready_.front();
        Record& record = records_[number];
        const bool is_remote = limits.is_remote && record.is_sealed;
        if (!frame.rows.empty() && is_remote != frame.is_remote) {
            break;
        }
        frame.is_remote = is_remote;
        const PieceLayout& layout = *record.place.layout;
        for (std::uint32_t piece = 0; piece < layout.piece_count() && record.wanted_left != 0; ++piece) {
            if (record.whole[piece] == 0 || record.wanted[piece] == 0) {
                continue;
            }
            const std::uint32_t size = layout.sizes[piece];
            // A piece larger than a frame goes alone.
            const bool fits = frame.body_bytes + size <= room || (frame.rows.empty() && size <= credit);
            if (!fits || frame.rows.size() == frame_pieces_max) {
                is_full = true;
                break;
            }
            frame.rows.push_back({number, piece, size, record.place.checksum(piece)});
            frame.body_bytes += size;
            record.wanted[piece] = 0;
            record.wanted_left -= 1;
        }
        if (!is_full) {
            ready_.pop_front();
            record.is_ready = false;
        }
        check_due(number);
    }
    if (frame.rows.empty()) {
        return frame;
    }
    left_ -= frame.rows.size();
    left_bytes_ -= frame.body_bytes;
    used_bytes_ += frame.body_bytes;
    frames_under_way_ += 1;
    if (limits.connection != 0) {
        taken_.resize(std::max<std::size_t>(taken_.size(), limits.connection));
        taken_[limits.connection - 1].frames.push_back(frame.rows);
    }
    return frame;
}

void Departures::sent(const Departing& frame) {
    const std::scoped_lock lock(lock_);
    frames_under_way_ -= 1;
    pieces_sent_ += frame.rows.size();
    for (const PieceRow& row : frame.rows) {
        records_[row.record].sent_bytes += row.size_bytes;
    }
}

void Departures::unsent(const Departing& frame, std::uint32_t connection) {
    const std::scoped_lock lock(lock_);
    frames_under_way_ -= 1;
    if (connection == 0) {
        want_pieces(frame.rows);
    }
}

void Departures::want_pieces(std::span<const PieceRow> rows) {
    for (const PieceRow& row : rows) {
        Record& record = records_[row.record];
        used_bytes_ -= row.size_bytes;
        if (record.wanted[row.piece] == 0) {
            record.wanted[row.piece] = 1;
            record.wanted_left += 1;
            left_ += 1;
            left_bytes_ += row.size_bytes;
        }
        enqueue(row.record);
    }
}

std::uint64_t Departures::lost(std::uint32_t connection, std::uint64_t frames_arrived) {
    const std::scoped_lock lock(lock_);
    const std::size_t taken = connection != 0 && connection <= taken_.size() ? taken_[connection - 1].frames.size() : 0;
    if (frames_arrived > taken) {
        throw NetError(Fault::protocol, "LOST claims " + std::to_string(frames_arrived) + " frames of connection " +
                                            std::to_string(connection) + ", which carried " + std::to_string(taken));
    }
    std::uint64_t pieces = 0;
    if (taken != 0) {
        std::vector<std::vector<PieceRow>>& frames = taken_[connection - 1].frames;
        for (std::size_t number = frames_arrived; number < frames.size(); ++number) {
            want_pieces(frames[number]);
            pieces += frames[number].size();
        }
        frames.resize(frames_arrived);
    }
    return pieces;
}

void Departures::check_due(std::uint32_t number) {
    const Record& record = records_[number];
    if (record.is_unsealed && record.is_sealed && record.wanted_left == 0) {
        due_.insert(number);
    }
}

void Departures::enqueue(std::uint32_t number) {
    if (!records_[number].is_ready) {
        records_[number].is_ready = true;
        ready_.push_back(number);
    }
}

bool Departures::has_sendable() const {
    const std::scoped_lock lock(lock_);
    const std::uint64_t credit = granted_bytes_ > used_bytes_ ? granted_bytes_ - used_bytes_ : 0;
    for (const std::uint32_t number : ready_) {
        const Record& record = records_[number];
        const std::vector<std::uint32_t>& sizes = record.place.layout->sizes;
        for (std::size_t piece = 0; piece < sizes.size() && record.wanted_left != 0; ++piece) {
            if (record.whole[piece] != 0 && record.wanted[piece] != 0) {
                return sizes[piece] <= credit;
            }
        }
    }
    return false;
}

std::uint64_t Departures::left_bytes() const {
    const std::scoped_lock lock(lock_);
    return left_bytes_;
}

bool Departures::has_left() const {
    const std::scoped_lock lock(lock_);
    return left_ != 0 || unsealed_ != 0 || frames_under_way_ != 0;
}

std::vector<DueSeal> Departures::next_seals(std::size_t count_max) {
    std::vector<DueSeal> seals;
    const std::scoped_lock lock(lock_);
    while (!due_.empty() && seals.size() < count_max) {
        const std::uint32_t number = *due_.begin();
        due_.erase(due_.begin());
        Record& record = records_[number];
        if (record.is_unsealed) {
            record.is_unsealed = false;
            unsealed_ -= 1;
            seals.push_back({number, record.cost_us});
        }
    }
    return seals;
}

std::uint64_t Departures::pieces_sent() const {
    const std::scoped_lock lock(lock_);
    return pieces_sent_;
}

std::vector<std::uint64_t> Departures::bytes_sent_by_record() const {
    const std::scoped_lock lock(lock_);
    std::vector<std::uint64_t> bytes;
    bytes.reserve(records_.size());
    for (const Record& record : records_) {
        bytes.push_back(record.sent_bytes);
    }
    return bytes;
}

}  // namespace kvstore::net
