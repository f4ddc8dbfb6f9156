#include <stdexcept>
#include <string>

#include "copy_rows.h"

namespace kvstore {
namespace {

// An entry in the messages: which function, which number.
struct Place {
    const char* function;
    std::size_t entry;
};

[[noreturn]] void refuse(const Place& place, const std::string& reason) {
    throw std::invalid_argument(std::string(place.function) + ": entry " + std::to_string(place.entry) +
                                " of the plan " + reason);
}

// The address after the last byte of a region. Returns false when it does not fit into 64 bits.
bool region_end(std::uint64_t begin, std::uint64_t rows, std::uint64_t row_bytes, std::uint64_t stride,
                std::uint64_t& end) {
    std::uint64_t to_last_row = 0;
    return !__builtin_mul_overflow(rows - 1, stride, &to_last_row) &&
           !__builtin_add_overflow(begin, to_last_row, &end) && !__builtin_add_overflow(end, row_bytes, &end);
}

void check_rows(const RowCopy& copy, const Place& place) {
    if (copy.rows == 0 || copy.row_bytes == 0) {
        return;
    }
    if (copy.destination == 0 || copy.source == 0) {
        refuse(place, copy.destination == 0 ? "has a null destination" : "has a null source");
    }
    if (copy.rows > 1 && (copy.destination_stride < copy.row_bytes || copy.source_stride < copy.row_bytes)) {
        refuse(place, "has a stride smaller than its row of " + std::to_string(copy.row_bytes) + " bytes");
    }
    std::uint64_t destination_end = 0;
    std::uint64_t source_end = 0;
    if (!region_end(copy.destination, copy.rows, copy.row_bytes, copy.destination_stride, destination_end) ||
        !region_end(copy.source, copy.rows, copy.row_bytes, copy.source_stride, source_end)) {
        refuse(place, "runs past the end of the address space");
    }
    if (copy.destination < source_end && copy.source < destination_end) {
        refuse(place, "has overlapping source and destination; copy through a buffer of its own");
    }
}

void check_checksum(std::uint64_t checksum, const Place& place) {
    std::uint64_t end = 0;
    if (__builtin_add_overflow(checksum, sizeof(std::uint32_t), &end)) {
        refuse(place, "has a place for its checksum that runs past the end of the address space");
    }
}

}  // namespace

void check_plan(std::span<const RowCopy> plan) {
    for (std::size_t entry = 0; entry < plan.size(); ++entry) {
        check_rows(plan[entry], {"copy_rows", entry});
    }
}

void check_plan(std::span<const PieceCopy> plan) {
    for (std::size_t entry = 0; entry < plan.size(); ++entry) {
        check_rows(plan[entry].copy, {"copy_rows_crc32c", entry});
        check_checksum(plan[entry].checksum, {"copy_rows_crc32c", entry});
    }
}

void check_plan(std::span<const PieceInPlace> plan) {
    for (std::size_t entry = 0; entry < plan.size(); ++entry) {
        const PieceInPlace& piece = plan[entry];
        const Place place{"crc32c_in_place", entry};
        std::uint64_t end = 0;
        if (piece.size_bytes != 0 &&
            (piece.address == 0 || __builtin_add_overflow(piece.address, piece.size_bytes, &end))) {
            refuse(place, "is null or runs past the end of the address space");
        }
        if (piece.checksum == 0) {
            refuse(place, "has no place for its checksum");
        }
        check_checksum(piece.checksum, place);
    }
}

}  // namespace kvstore
