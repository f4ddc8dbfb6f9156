#include "copy_rows.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvstore {
namespace {

[[noreturn]] void refuse(std::size_t entry, const std::string& reason) {
    throw std::invalid_argument("copy_rows: entry " + std::to_string(entry) + " of the plan " + reason);
}

// The address after the last byte of a region. Returns false when it does not fit into 64 bits.
bool region_end(std::uint64_t begin, std::uint64_t rows, std::uint64_t row_bytes, std::uint64_t stride,
                std::uint64_t& end) {
    std::uint64_t to_last_row = 0;
    return !__builtin_mul_overflow(rows - 1, stride, &to_last_row) &&
           !__builtin_add_overflow(begin, to_last_row, &end) && !__builtin_add_overflow(end, row_bytes, &end);
}

}  // namespace

void check_plan(std::span<const RowCopy> plan) {
    for (std::size_t entry = 0; entry < plan.size(); ++entry) {
        const RowCopy& copy = plan[entry];
        if (copy.rows == 0 || copy.row_bytes == 0) {
            continue;
        }
        if (copy.destination == 0 || copy.source == 0) {
            refuse(entry, copy.destination == 0 ? "has a null destination" : "has a null source");
        }
        if (copy.rows > 1 && (copy.destination_stride < copy.row_bytes || copy.source_stride < copy.row_bytes)) {
            refuse(entry, "has a stride smaller than its row of " + std::to_string(copy.row_bytes) + " bytes");
        }
        std::uint64_t destination_end = 0;
        std::uint64_t source_end = 0;
        if (!region_end(copy.destination, copy.rows, copy.row_bytes, copy.destination_stride, destination_end) ||
            !region_end(copy.source, copy.rows, copy.row_bytes, copy.source_stride, source_end)) {
            refuse(entry, "runs past the end of the address space");
        }
        if (copy.destination < source_end && copy.source < destination_end) {
            refuse(entry, "has overlapping source and destination; copy through a buffer of its own");
        }
    }
}

void copy_rows(std::span<const RowCopy> plan) {
    for (const RowCopy& copy : plan) {
        if (copy.rows == 0 || copy.row_bytes == 0) {
            continue;
        }
        auto* destination = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(copy.destination));
        const auto* source = reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(copy.source));
        if (copy.destination_stride == copy.row_bytes && copy.source_stride == copy.row_bytes) {
            std::memcpy(destination, source, copy.rows * copy.row_bytes);
            continue;
        }
        for (std::uint64_t row = 0; row < copy.rows; ++row) {
            std::memcpy(destination + row * copy.destination_stride, source + row * copy.source_stride,
                        copy.row_bytes);
        }
    }
}

}  // namespace kvstore
