// Strided row copies: the gather of tensors into records and the scatter back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "copy_kernels.h"

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

// As RowCopy, with the checksum of the entry's bytes in the order of its rows. Consecutive entries that name the same
// place make one piece: the checksum runs on from one to the next.
struct PieceCopy {
    RowCopy copy;
    std::uint64_t checksum;  // address of the uint32 that takes it, of any alignment; 0 for none
};
static_assert(sizeof(PieceCopy) == 7 * sizeof(std::uint64_t));

// One piece where it lies, and the place of its checksum.
struct PieceInPlace {
    std::uint64_t address;
    std::uint64_t size_bytes;
    std::uint64_t checksum;
};
static_assert(sizeof(PieceInPlace) == 3 * sizeof(std::uint64_t));

struct CopyOptions {
    const CopyKernels& kernels = active_copy_kernels();
    unsigned threads = 1;         // at most; the calling thread is one of them
    std::optional<bool> streams;  // without it, the plan's size decides; see stream_bytes_min
};

// Throw std::invalid_argument naming the first entry that no copy could mean: a null address, a stride smaller than the
// row, a region past the end of the address space, or source and destination that overlap.
// They cannot know how large the buffers are: the caller has checked that.
void check_plan(std::span<const RowCopy> plan);
void check_plan(std::span<const PieceCopy> plan);
void check_plan(std::span<const PieceInPlace> plan);

// Copy all entries. With one thread in order; with more, the entries' destinations must not overlap.
// REQUIRES: check_plan passed; all regions are mapped.
void copy_rows(std::span<const RowCopy> plan, const CopyOptions& options = {});
void copy_rows_crc32c(std::span<const PieceCopy> plan, const CopyOptions& options = {});

// Stores the CRC32C of each piece. REQUIRES: as copy_rows.
void crc32c_in_place(std::span<const PieceInPlace> plan, const CopyOptions& options = {});

}  // namespace kvstore
