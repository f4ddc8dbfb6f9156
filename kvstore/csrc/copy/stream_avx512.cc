#include "copy_path.h"
#include "prefetch_ahead.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace kvstore {

__attribute__((target("avx512f"))) void stream_avx512(std::byte* destination, const std::byte* source,
                                                      std::size_t size_bytes) {
    constexpr std::size_t line_bytes = sizeof(__m512i);
    constexpr std::size_t step_bytes = 4 * line_bytes;
    // Whole cache lines only: a line written in part, or in both ways, is written to memory twice.
    const std::size_t head = std::min(size_bytes, -reinterpret_cast<std::uintptr_t>(destination) % line_bytes);
    std::memcpy(destination, source, head);
    std::size_t at = head;
    for (; size_bytes - at >= step_bytes; at += step_bytes) {
        const std::byte* from = source + at;
        auto* to = reinterpret_cast<__m512i*>(destination + at);
        for (std::size_t line = 0; line < step_bytes; line += line_bytes) {
            prefetch_ahead(from + line);
        }
        const __m512i first = _mm512_loadu_si512(from);
        const __m512i second = _mm512_loadu_si512(from + line_bytes);
        const __m512i third = _mm512_loadu_si512(from + 2 * line_bytes);
        const __m512i fourth = _mm512_loadu_si512(from + 3 * line_bytes);
        _mm512_stream_si512(to, first);
        _mm512_stream_si512(to + 1, second);
        _mm512_stream_si512(to + 2, third);
        _mm512_stream_si512(to + 3, fourth);
    }
    for (; size_bytes - at >= line_bytes; at += line_bytes) {
        const __m512i line = _mm512_loadu_si512(source + at);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + at), line);
    }
    std::memcpy(destination + at, source + at, size_bytes - at);
}

}  // namespace kvstore

#endif
