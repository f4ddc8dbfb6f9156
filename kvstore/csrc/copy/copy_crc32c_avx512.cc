#include <algorithm>
#include <cstring>

#include "../checksum/crc32c_fold_avx512.h"
#include "copy_kernels.h"

#if defined(__x86_64__)

namespace kvstore {
namespace {

// Shorter data does not repay the reduction at the end.
constexpr std::size_t fold_bytes_min = 4 * crc32c_fold::step_bytes;

template <bool streams>
KVSTORE_INLINE_FOLD void store(std::byte* destination, const crc32c_fold::Vectors& data) {
    auto* to = reinterpret_cast<__m512i*>(destination);
    if constexpr (streams) {
        _mm512_stream_si512(to, data.first);
        _mm512_stream_si512(to + 1, data.second);
        _mm512_stream_si512(to + 2, data.third);
        _mm512_stream_si512(to + 3, data.fourth);
    } else {
        _mm512_store_si512(to, data.first);
        _mm512_store_si512(to + 1, data.second);
        _mm512_store_si512(to + 2, data.third);
        _mm512_store_si512(to + 3, data.fourth);
    }
}

std::uint32_t copy_short(std::byte* destination, const std::byte* source, std::size_t size_bytes, std::uint32_t value) {
    std::memcpy(destination, source, size_bytes);
    return crc32c_sse42(source, size_bytes, value);
}

template <bool streams>
KVSTORE_TARGET_FOLD std::uint32_t copy_and_fold(std::byte* destination, const std::byte* source,
                                                std::size_t size_bytes, std::uint32_t value) {
    using namespace crc32c_fold;
    if (size_bytes < fold_bytes_min) {
        return copy_short(destination, source, size_bytes, value);
    }
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(destination) % vector_bytes;
    value = copy_short(destination, source, head, value);

    std::size_t at = head;
    Vectors data = load(source + at);
    store<streams>(destination + at, data);
    Vectors accumulators = begin(data, ~value);
    for (at += step_bytes; size_bytes - at >= step_bytes; at += step_bytes) {
        data = load(source + at);
        store<streams>(destination + at, data);
        take(accumulators, data);
    }
    return copy_short(destination + at, source + at, size_bytes - at, ~finish(accumulators));
}

}  // namespace

std::uint32_t copy_crc32c_avx512(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                 std::uint32_t value) {
    return copy_and_fold<false>(destination, source, size_bytes, value);
}

std::uint32_t stream_crc32c_avx512(std::byte* destination, const std::byte* source, std::size_t size_bytes,
                                   std::uint32_t value) {
    return copy_and_fold<true>(destination, source, size_bytes, value);
}

}  // namespace kvstore

#endif
