#include "copy_kernels.h"

#include <algorithm>
#include <cstring>

namespace kvstore {
namespace {

// One triple of the longest streams of the sse42 checksum; both it and its copy fit into a first-level cache.
constexpr std::size_t stretch_bytes = 12 << 10;

}  // namespace

CopyKernels::CopyKernels(const CopyPath& copy, const Crc32cPath& checksum)
    : stream_(copy.stream), checksum_(checksum.function) {
#if defined(__x86_64__)
    if (copy.name == "avx512" && checksum.name == "avx512") {
        fused_copy_ = &copy_crc32c_avx512;
        fused_stream_ = &stream_crc32c_avx512;
    }
#endif
}

void CopyKernels::copy(std::byte* destination, const std::byte* source, std::size_t size_bytes, bool streams) const {
    if (streams) {
        stream_(destination, source, size_bytes);
    } else {
        std::memcpy(destination, source, size_bytes);
    }
}

std::uint32_t CopyKernels::copy_checksum(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                         std::uint32_t value, bool streams) const {
    if (is_fused()) {
        return (streams ? fused_stream_ : fused_copy_)(destination, source, size_bytes, value);
    }
    for (std::size_t at = 0; at < size_bytes; at += stretch_bytes) {
        const std::size_t stretch = std::min(stretch_bytes, size_bytes - at);
        value = checksum_(source + at, stretch, value);
        copy(destination + at, source + at, stretch, streams);
    }
    return value;
}

const CopyKernels& active_copy_kernels() {
    static const CopyKernels kernels(active_copy_path(), active_crc32c_path());
    return kernels;
}

}  // namespace kvstore
