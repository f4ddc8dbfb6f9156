// The copy of one contiguous range, with or without its checksum, by a pair of paths.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../checksum/crc32c.h"
#include "copy_path.h"

namespace kvstore {

// Copies and returns the checksum of the bytes, continued from `value`.
using CopyChecksumFunction = std::uint32_t (*)(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                               std::uint32_t value);

// One pass: each byte is stored and folded into the checksum from the register that it was loaded to.
// REQUIRES: AVX-512F, VPCLMULQDQ, PCLMULQDQ and SSE4.2. Not defined where x86-64 is not the target.
std::uint32_t copy_crc32c_avx512(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                 std::uint32_t value);
std::uint32_t stream_crc32c_avx512(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                   std::uint32_t value);

// Immutable; any thread.
class CopyKernels {
  public:
    CopyKernels(const CopyPath& copy, const Crc32cPath& checksum);

    void copy(std::byte* destination, const std::byte* source, std::size_t size_bytes, bool streams) const;

    // Where no one-pass function fits both paths, a stretch is checksummed, and copied while it lies in the nearest cache.
    std::uint32_t copy_checksum(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                std::uint32_t value, bool streams) const;

    std::uint32_t checksum(const std::byte* data, std::size_t size_bytes, std::uint32_t value) const {
        return checksum_(data, size_bytes, value);
    }

    // Whether copy_checksum takes one pass.
    bool is_fused() const { return fused_copy_ != nullptr; }

  private:
    StreamFunction stream_;
    Crc32cFunction checksum_;
    CopyChecksumFunction fused_copy_ = nullptr;
    CopyChecksumFunction fused_stream_ = nullptr;
};

// Those of this process's paths.
const CopyKernels& active_copy_kernels();

}  // namespace kvstore
