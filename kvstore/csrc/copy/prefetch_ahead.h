// Fetching the source of a streaming copy ahead of need: the hardware's own prefetcher begins anew on each page and at
// each piece.
#pragma once

#if defined(__x86_64__)

#include <xmmintrin.h>

#include <cstddef>
#include <cstdint>

namespace kvstore {

// By integers, since a pointer past the end of the data may not even be formed. Fetching there does no harm.
inline void prefetch_ahead(const std::byte* source) {
    constexpr std::uintptr_t distance_bytes = 2048;
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(source) + distance_bytes), _MM_HINT_T0);
}

}  // namespace kvstore

#endif
