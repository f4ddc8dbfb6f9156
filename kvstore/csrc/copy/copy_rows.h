// Strided row copies: the gather of tensors into records and the scatter back.
#pragma once

#include <cstdint>
#include <span>

namespace kvstore {

// One entry of a plan. Addresses are absolute, all other fields are bytes except `rows`.
// Row i goes from source + i * source_stride to destination + i * destination_stride.
struct RowCopy {
    std::uint64_t destination;
    std::uint64_t source;
    std::uint64_t rows;
    std::uint64_t row_bytes;
    std::uint64_t destination_stride;
    std::uint64_t source_stride;
};
static_assert(sizeof(RowCopy) == 6 * sizeof(std::uint64_t));

// Throws std::invalid_argument naming the first entry that no copy could mean: a null address, a stride smaller than
// the row, a region past the end of the address space, or source and destination that overlap.
// It cannot know how large the buffers are: the caller has checked that.
void check_plan(std::span<const RowCopy> plan);

// Copies all entries in order on the calling thread. REQUIRES: check_plan passed; all regions are mapped.
void copy_rows(std::span<const RowCopy> plan);

}  // namespace kvstore
