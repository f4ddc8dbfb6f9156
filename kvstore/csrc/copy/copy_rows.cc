#include "copy_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "row_walker.h"
#include "shares.h"

namespace kvstore {
namespace {

// Shares of a plan are this large, or smaller so that each thread gets several: the last one to end is waited for.
constexpr std::uint64_t share_bytes_max = 1 << 20;
constexpr std::uint64_t share_bytes_min = 64 << 10;
constexpr std::uint64_t shares_per_thread = 8;

std::uint64_t size_of(const RowCopy& entry) {
    return entry.rows * entry.row_bytes;
}
std::uint64_t size_of(const PieceCopy& entry) {
    return size_of(entry.copy);
}
std::uint64_t size_of(const PieceInPlace& entry) {
    return entry.size_bytes;
}

void store_checksum(std::uint64_t address, std::uint32_t value) {
    std::memcpy(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)), &value, sizeof value);
}

// Entries that must stay together, since one checksum runs over them.
bool continues(const RowCopy&, const RowCopy&) {
    return false;
}
bool continues(const PieceInPlace&, const PieceInPlace&) {
    return false;
}
bool continues(const PieceCopy& entry, const PieceCopy& next) {
    return entry.checksum != 0 && entry.checksum == next.checksum;
}

void take(std::span<const RowCopy> entries, RowWalker& walker, const CopyKernels&) {
    for (const RowCopy& entry : entries) {
        walker.copy(entry);
    }
}

void take(std::span<const PieceCopy> entries, RowWalker& walker, const CopyKernels&) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        const PieceCopy& entry = entries[i];
        if (entry.checksum == 0) {
            walker.copy(entry.copy);
            continue;
        }
        value = walker.copy_checksum(entry.copy, value);
        if (i + 1 == entries.size() || !continues(entry, entries[i + 1])) {
            store_checksum(entry.checksum, value);
            value = 0;
        }
    }
}

void take(std::span<const PieceInPlace> entries, RowWalker&, const CopyKernels& kernels) {
    for (const PieceInPlace& piece : entries) {
        const auto* data = reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(piece.address));
        store_checksum(piece.checksum, kernels.checksum(data, piece.size_bytes, 0));
    }
}

// An entry without a checksum in parts of about `part_bytes`, so that threads can share it.
void append_parts(std::vector<RowCopy>& parts, const RowCopy& entry, std::uint64_t part_bytes) {
    const std::uint64_t size_bytes = size_of(entry);
    if (size_bytes <= part_bytes) {
        parts.push_back(entry);
        return;
    }
    const bool is_dense =
        entry.rows == 1 || (entry.destination_stride == entry.row_bytes && entry.source_stride == entry.row_bytes);
    if (is_dense) {
        for (std::uint64_t at = 0; at < size_bytes; at += part_bytes) {
            const std::uint64_t part = std::min(part_bytes, size_bytes - at);
            parts.push_back({entry.destination + at, entry.source + at, 1, part, part, part});
        }
        return;
    }
    const std::uint64_t rows_per_part = std::max<std::uint64_t>(1, part_bytes / entry.row_bytes);
    for (std::uint64_t row = 0; row < entry.rows; row += rows_per_part) {
        RowCopy part = entry;
        part.destination += row * entry.destination_stride;
        part.source += row * entry.source_stride;
        part.rows = std::min(rows_per_part, entry.rows - row);
        parts.push_back(part);
    }
}

std::vector<RowCopy> in_parts(std::span<const RowCopy> plan, std::uint64_t part_bytes) {
    std::vector<RowCopy> parts;
    parts.reserve(plan.size());
    for (const RowCopy& entry : plan) {
        append_parts(parts, entry, part_bytes);
    }
    return parts;
}

std::vector<PieceCopy> in_parts(std::span<const PieceCopy> plan, std::uint64_t part_bytes) {
    std::vector<PieceCopy> parts;
    std::vector<RowCopy> rows;
    parts.reserve(plan.size());
    for (const PieceCopy& entry : plan) {
        if (entry.checksum != 0) {
            parts.push_back(entry);
            continue;
        }
        rows.clear();
        append_parts(rows, entry.copy, part_bytes);
        for (const RowCopy& part : rows) {
            parts.push_back({part, 0});
        }
    }
    return parts;
}

std::span<const PieceInPlace> in_parts(std::span<const PieceInPlace> plan, std::uint64_t) {
    return plan;
}

// Where each share begins, and the end of the last.
template <typename Entry>
std::vector<std::size_t> share_edges(std::span<const Entry> entries, std::uint64_t share_bytes) {
    std::vector<std::size_t> edges{0};
    std::uint64_t size_bytes = 0;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        size_bytes += size_of(entries[i]);
        const bool is_last = i + 1 == entries.size();
        if (is_last || (size_bytes >= share_bytes && !continues(entries[i], entries[i + 1]))) {
            edges.push_back(i + 1);
            size_bytes = 0;
        }
    }
    return edges;
}

template <typename Entry>
void run(std::span<const Entry> plan, const CopyOptions& options) {
    std::uint64_t size_bytes = 0;
    for (const Entry& entry : plan) {
        size_bytes += size_of(entry);
    }
    const bool streams = options.streams.value_or(size_bytes >= stream_bytes_min());
    const auto take_entries = [&](std::span<const Entry> entries) {
        RowWalker walker(options.kernels, streams);
        take(entries, walker, options.kernels);
        if (streams) {
            stream_fence();
        }
    };
    if (options.threads < 2 || size_bytes < 2 * share_bytes_min) {
        take_entries(plan);
        return;
    }
    const std::uint64_t share_bytes =
        std::clamp(size_bytes / (options.threads * shares_per_thread), share_bytes_min, share_bytes_max);
    const auto parts = in_parts(plan, share_bytes);
    const std::span<const Entry> entries(parts);
    const std::vector<std::size_t> edges = share_edges(entries, share_bytes);
    run_shares(edges.size() - 1, options.threads, [&](std::size_t share) {
        take_entries(entries.subspan(edges[share], edges[share + 1] - edges[share]));
    });
}

}  // namespace

void copy_rows(std::span<const RowCopy> plan, const CopyOptions& options) {
    run(plan, options);
}

void copy_rows_crc32c(std::span<const PieceCopy> plan, const CopyOptions& options) {
    run(plan, options);
}

void crc32c_in_place(std::span<const PieceInPlace> plan, const CopyOptions& options) {
    run(plan, options);
}

}  // namespace kvstore
