// Committed records, in one list per node: by group, span, exactness and tier, then in the order of their coming.
#pragma once

#include <cstdint>

#include "chunked.h"
#include "grids.h"
#include "types.h"

namespace kvstore::index {

// Shard units [start, stop) of a group.
struct Units {
    std::uint16_t start;
    std::uint16_t stop;

    bool covers(Units other) const { return start <= other.start && other.stop <= stop; }
    friend bool operator==(Units, Units) = default;
};

struct Record {
    std::uint64_t slot_index;
    std::uint64_t slot_generation;
    std::uint64_t cost_us;
    std::uint32_t slot_bytes;
    GridId grid;
    RecordId next;
    std::uint16_t span;
    Units units;
    std::uint8_t group;
    std::uint8_t tier;
    std::uint8_t codec;
    bool is_lossy;

    Slot slot() const { return {slot_index, slot_generation, slot_bytes}; }
    std::uint32_t place() const { return (std::uint32_t{group} << 16) | span; }
    std::uint64_t order() const {
        return (std::uint64_t{place()} << 16) | (std::uint64_t{is_lossy} << 8) | tier;
    }
};

class Records {
  public:
    static constexpr std::size_t record_bytes = sizeof(Record);

    Record& operator[](RecordId id) { return records_[id]; }
    const Record& operator[](RecordId id) const { return records_[id]; }

    std::uint32_t size() const { return count_; }
    std::size_t allocated_bytes() const { return records_.allocated_bytes(); }

    // Afterwards adding this many throws nothing.
    void reserve(std::size_t count) {
        records_.reserve(records_.size() + (count > free_count_ ? count - free_count_ : 0));
    }

    RecordId add(const Record& record) {
        ++count_;
        if (free_ == none) {
            return records_.append(record);
        }
        const RecordId id = free_;
        free_ = records_[id].next;
        --free_count_;
        records_[id] = record;
        return id;
    }

    void remove(RecordId id) {
        --count_;
        records_[id].next = free_;
        free_ = id;
        ++free_count_;
    }

  private:
    Chunked<Record> records_;
    RecordId free_ = none;
    std::uint32_t free_count_ = 0;
    std::uint32_t count_ = 0;
};

}  // namespace kvstore::index
