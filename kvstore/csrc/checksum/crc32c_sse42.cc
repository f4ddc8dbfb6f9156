// CRC32C with the SSE4.2 instruction on three interleaved streams, joined by carry-less multiplication
// (V. Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", Intel 2011).
//
// The instruction has a latency of three cycles and a throughput of one, so three independent streams keep it busy.
#include "crc32c.h"

#if defined(__x86_64__)

#include <nmmintrin.h>
#include <wmmintrin.h>

#include <cstring>

#include "crc32c_polynomial.h"

// Only these functions may use the extensions; nothing else in the library is compiled for them.
#define KVSTORE_TARGET_SSE42 __attribute__((target("sse4.2,pclmul")))

namespace kvstore {
namespace {

std::uint64_t load(const unsigned char* data) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof word);
    return word;
}

// The factor that moves a state over `bytes` zero bytes. The carry-less product of two reflected 32-bit values lacks
// one power of x, and the reduction by the CRC instruction multiplies by x^32: together x^33 too many.
constexpr std::uint32_t shift_factor(std::size_t bytes) {
    return crc32c_polynomial::power_of_x(8 * bytes - 33);
}

KVSTORE_TARGET_SSE42 inline std::uint64_t shifted(std::uint64_t state, std::uint32_t factor) {
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(state)),
                                                 _mm_cvtsi64_si128(static_cast<long long>(factor)), 0);
    return _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(product)));
}

constexpr std::size_t cache_line_bytes = 64;
// Shorter triples end before a fetch from DRAM would arrive.
constexpr std::size_t prefetch_distance_bytes = 4096;

// By integers, since a pointer past the end of the data may not even be formed.
void prefetch(const unsigned char* data, std::size_t ahead_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(data) + ahead_bytes), _MM_HINT_T0);
}

// Takes as many whole triples of streams of `stream_bytes` as there are; advances `next` and `size_bytes`.
//
// Each stream fetches its place in the next triple ahead of need: three short runs per page are too little for the
// hardware's own prefetcher, and data from DRAM would come at half speed. Fetching past the end does no harm.
template <std::size_t stream_bytes>
KVSTORE_TARGET_SSE42 inline std::uint64_t take_triples(const unsigned char*& next, std::size_t& size_bytes,
                                                       std::uint64_t state) {
    static_assert(stream_bytes % cache_line_bytes == 0 && 8 * stream_bytes > 33);
    constexpr std::uint32_t over_one = shift_factor(stream_bytes);
    constexpr std::uint32_t over_two = shift_factor(2 * stream_bytes);
    while (size_bytes >= 3 * stream_bytes) {
        std::uint64_t first = state;
        std::uint64_t second = 0;
        std::uint64_t third = 0;
        for (const unsigned char* end = next + stream_bytes; next != end; next += cache_line_bytes) {
            if constexpr (3 * stream_bytes >= prefetch_distance_bytes) {
                prefetch(next, 3 * stream_bytes);
                prefetch(next, 4 * stream_bytes);
                prefetch(next, 5 * stream_bytes);
            }
            for (std::size_t at = 0; at < cache_line_bytes; at += sizeof(std::uint64_t)) {
                first = _mm_crc32_u64(first, load(next + at));
                second = _mm_crc32_u64(second, load(next + stream_bytes + at));
                third = _mm_crc32_u64(third, load(next + 2 * stream_bytes + at));
            }
        }
        state = shifted(first, over_two) ^ shifted(second, over_one) ^ third;
        next += 2 * stream_bytes;
        size_bytes -= 3 * stream_bytes;
    }
    return state;
}

}  // namespace

KVSTORE_TARGET_SSE42 std::uint32_t crc32c_sse42(const void* data, std::size_t size_bytes, std::uint32_t value) {
    const auto* next = static_cast<const unsigned char*>(data);
    std::uint64_t state = static_cast<std::uint32_t>(~value);
    state = take_triples<4096>(next, size_bytes, state);
    state = take_triples<512>(next, size_bytes, state);
    state = take_triples<64>(next, size_bytes, state);
    for (; size_bytes >= sizeof(std::uint64_t); size_bytes -= sizeof(std::uint64_t), next += sizeof(std::uint64_t)) {
        state = _mm_crc32_u64(state, load(next));
    }
    auto narrow = static_cast<std::uint32_t>(state);
    for (; size_bytes > 0; --size_bytes, ++next) {
        narrow = _mm_crc32_u8(narrow, *next);
    }
    return ~narrow;
}

}  // namespace kvstore

#endif
