#include "row_walker.h"

#include <algorithm>
#include <cstring>

namespace kvstore {
namespace {

// A shorter row does not repay a call of its own to a streaming or checksumming function.
constexpr std::uint64_t long_row_bytes = 2048;

std::byte* destination_of(const RowCopy& entry) {
    return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(entry.destination));
}

const std::byte* source_of(const RowCopy& entry) {
    return reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(entry.source));
}

bool is_empty(const RowCopy& entry) {
    return entry.rows == 0 || entry.row_bytes == 0;
}

bool has_dense_destination(const RowCopy& entry) {
    return entry.rows == 1 || entry.destination_stride == entry.row_bytes;
}

bool has_dense_source(const RowCopy& entry) {
    return entry.rows == 1 || entry.source_stride == entry.row_bytes;
}

void copy_short_rows(std::byte* destination, std::uint64_t destination_stride, const std::byte* source,
                     std::uint64_t source_stride, std::uint64_t rows, std::uint64_t row_bytes) {
    for (std::uint64_t row = 0; row < rows; ++row) {
        std::memcpy(destination + row * destination_stride, source + row * source_stride, row_bytes);
    }
}

}  // namespace

void RowWalker::copy(const RowCopy& entry) {
    if (is_empty(entry)) {
        return;
    }
    std::byte* destination = destination_of(entry);
    const std::byte* source = source_of(entry);
    if (has_dense_destination(entry) && has_dense_source(entry)) {
        kernels_.copy(destination, source, entry.rows * entry.row_bytes, streams_);
    } else if (entry.row_bytes >= long_row_bytes) {
        for (std::uint64_t row = 0; row < entry.rows; ++row) {
            kernels_.copy(destination + row * entry.destination_stride, source + row * entry.source_stride,
                          entry.row_bytes, streams_);
        }
    } else if (streams_ && has_dense_destination(entry)) {
        std::uint32_t unused = 0;
        gather_stretches(entry, false, unused);
    } else {
        copy_short_rows(destination, entry.destination_stride, source, entry.source_stride, entry.rows,
                        entry.row_bytes);
    }
}

std::uint32_t RowWalker::copy_checksum(const RowCopy& entry, std::uint32_t value) {
    if (is_empty(entry)) {
        return value;
    }
    std::byte* destination = destination_of(entry);
    const std::byte* source = source_of(entry);
    if (has_dense_destination(entry) && has_dense_source(entry)) {
        return kernels_.copy_checksum(destination, source, entry.rows * entry.row_bytes, value, streams_);
    }
    if (entry.row_bytes >= long_row_bytes) {
        for (std::uint64_t row = 0; row < entry.rows; ++row) {
            value = kernels_.copy_checksum(destination + row * entry.destination_stride,
                                           source + row * entry.source_stride, entry.row_bytes, value, streams_);
        }
        return value;
    }
    gather_stretches(entry, true, value);
    return value;
}

// Short rows, as many at a time as lie in the nearest cache: as one dense range they leave, or are checksummed.
void RowWalker::gather_stretches(const RowCopy& entry, bool with_checksum, std::uint32_t& value) {
    const std::uint64_t rows_at_once = bounce_bytes / entry.row_bytes;
    std::byte* destination = destination_of(entry);
    const std::byte* source = source_of(entry);
    for (std::uint64_t row = 0; row < entry.rows; row += rows_at_once) {
        const std::uint64_t rows = std::min(rows_at_once, entry.rows - row);
        const std::size_t size_bytes = rows * entry.row_bytes;
        std::byte* to = destination + row * entry.destination_stride;
        const std::byte* from = source + row * entry.source_stride;
        const std::byte* dense = from;
        if (!has_dense_source(entry)) {
            copy_short_rows(bounce_.data(), entry.row_bytes, from, entry.source_stride, rows, entry.row_bytes);
            dense = bounce_.data();
        }
        if (!has_dense_destination(entry)) {
            value = kernels_.checksum(dense, size_bytes, value);
            copy_short_rows(to, entry.destination_stride, dense, entry.row_bytes, rows, entry.row_bytes);
        } else if (with_checksum) {
            value = kernels_.copy_checksum(to, dense, size_bytes, value, streams_);
        } else {
            kernels_.copy(to, dense, size_bytes, streams_);
        }
    }
}

}  // namespace kvstore
