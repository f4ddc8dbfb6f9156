#include "crc32c.h"
#include "crc32c_fold_avx512.h"

#if defined(__x86_64__)

namespace kvstore {
namespace {

// Shorter data does not repay the reduction at the end.
constexpr std::size_t fold_bytes_min = 4 * crc32c_fold::step_bytes;
constexpr std::size_t prefetch_distance_bytes = 2048;

// By integers, since a pointer past the end of the data may not even be formed. Fetching there does no harm.
void prefetch_step(const unsigned char* data) {
    const std::uintptr_t ahead = reinterpret_cast<std::uintptr_t>(data) + prefetch_distance_bytes;
    for (std::size_t line = 0; line < crc32c_fold::step_bytes; line += crc32c_fold::vector_bytes) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
    }
}

}  // namespace

KVSTORE_TARGET_FOLD std::uint32_t crc32c_avx512(const void* data, std::size_t size_bytes, std::uint32_t value) {
    using namespace crc32c_fold;
    if (size_bytes < fold_bytes_min) {
        return crc32c_sse42(data, size_bytes, value);
    }
    const auto* next = static_cast<const unsigned char*>(data);
    Vectors accumulators = begin(load(next), ~value);
    next += step_bytes;
    size_bytes -= step_bytes;
    for (; size_bytes >= step_bytes; size_bytes -= step_bytes, next += step_bytes) {
        prefetch_step(next);
        take(accumulators, load(next));
    }
    return crc32c_sse42(next, size_bytes, ~finish(accumulators));
}

}  // namespace kvstore

#endif
