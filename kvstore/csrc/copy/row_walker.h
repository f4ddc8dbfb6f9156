// One entry of a plan at a time: which rows go together, and by which way.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "copy_rows.h"

namespace kvstore {

// Not for several threads: each has its own.
class RowWalker {
  public:
    RowWalker(const CopyKernels& kernels, bool streams) : kernels_(kernels), streams_(streams) {}

    void copy(const RowCopy& entry);

    // Returns the checksum of the entry's bytes in the order of its rows, continued from `value`.
    std::uint32_t copy_checksum(const RowCopy& entry, std::uint32_t value);

  private:
    void gather_stretches(const RowCopy& entry, bool with_checksum, std::uint32_t& value);

    // Where short rows meet before they leave as one range.
    static constexpr std::size_t bounce_bytes = 12 << 10;

    const CopyKernels& kernels_;
    const bool streams_;
    alignas(64) std::array<std::byte, bounce_bytes> bounce_;
};

}  // namespace kvstore
