#include "copy_path.h"
#include "prefetch_ahead.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace kvstore {

__attribute__((target("avx2"))) void stream_avx2(std::byte* destination, const std::byte* source,
                                                 std::size_t size_bytes) {
    constexpr std::size_t line_bytes = 64;
    constexpr std::size_t vector_bytes = sizeof(__m256i);
    // Whole cache lines only: a line written in part, or in both ways, is written to memory twice.
    const std::size_t head = std::min(size_bytes, -reinterpret_cast<std::uintptr_t>(destination) % line_bytes);
    std::memcpy(destination, source, head);
    std::size_t at = head;
    for (; size_bytes - at >= line_bytes; at += line_bytes) {
        const auto* from = reinterpret_cast<const __m256i*>(source + at);
        auto* to = reinterpret_cast<__m256i*>(destination + at);
        static_assert(2 * vector_bytes == line_bytes);
        prefetch_ahead(source + at);
        const __m256i low = _mm256_loadu_si256(from);
        const __m256i high = _mm256_loadu_si256(from + 1);
        _mm256_stream_si256(to, low);
        _mm256_stream_si256(to + 1, high);
    }
    std::memcpy(destination + at, source + at, size_bytes - at);
}

}  // namespace kvstore

#endif
