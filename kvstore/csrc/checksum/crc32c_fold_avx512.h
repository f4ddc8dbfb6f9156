// CRC32C by folding: four accumulators of 64 bytes, each advanced over 256 bytes by carry-less multiplication
// (V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009, with the
// 512-bit form of the instruction).
//
// A 128-bit lane holds a polynomial with bit i as the coefficient of x^(127-i): its low half is l(x) x^64, its high half
// h(x). Moving it over D bits means multiplying by x^D modulo P, so l is multiplied by x^(D+64) and h by x^D. The
// product of two reflected 64-bit values lacks one power of x, so the factors are x^(D+63) and x^(D-1) modulo P.
//
// REQUIRES: a CPU with AVX-512F, VPCLMULQDQ, PCLMULQDQ and SSE4.2, for everything here.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "crc32c_polynomial.h"

#define KVSTORE_TARGET_FOLD __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))
#define KVSTORE_INLINE_FOLD KVSTORE_TARGET_FOLD __attribute__((always_inline)) inline

namespace kvstore::crc32c_fold {

inline constexpr std::size_t vector_bytes = 64;
inline constexpr std::size_t step_bytes = 4 * vector_bytes;

// 256 bytes: data as it was loaded, or what stands for all data so far.
struct Vectors {
    __m512i first;
    __m512i second;
    __m512i third;
    __m512i fourth;
};

// Factors for a lane that is moved over `bits`; a reflected polynomial of degree below 32 lies in the upper half.
constexpr long long low_factor(std::uint64_t bits) {
    return static_cast<long long>(std::uint64_t{crc32c_polynomial::power_of_x(bits + 63)} << 32);
}
constexpr long long high_factor(std::uint64_t bits) {
    return static_cast<long long>(std::uint64_t{crc32c_polynomial::power_of_x(bits - 1)} << 32);
}

KVSTORE_INLINE_FOLD Vectors load(const void* data) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    return {_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes + vector_bytes),
            _mm512_loadu_si512(bytes + 2 * vector_bytes), _mm512_loadu_si512(bytes + 3 * vector_bytes)};
}

// The accumulators after the first 256 bytes of data; `state` is the inverted checksum of what came before.
KVSTORE_INLINE_FOLD Vectors begin(const Vectors& data, std::uint32_t state) {
    const __m512i carried = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state)));
    return {_mm512_xor_si512(data.first, carried), data.second, data.third, data.fourth};
}

// a ^ b ^ c
KVSTORE_INLINE_FOLD __m512i sum(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

KVSTORE_INLINE_FOLD __m512i moved(__m512i lanes, __m512i factors, __m512i data) {
    return sum(_mm512_clmulepi64_epi128(lanes, factors, 0x00), _mm512_clmulepi64_epi128(lanes, factors, 0x11), data);
}

template <std::uint64_t bits>
KVSTORE_INLINE_FOLD __m512i factors() {
    constexpr long long low = low_factor(bits);
    constexpr long long high = high_factor(bits);
    return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

// Moves the accumulators over the next 256 bytes and adds these.
KVSTORE_INLINE_FOLD void take(Vectors& accumulators, const Vectors& data) {
    const __m512i over_step = factors<8 * step_bytes>();
    accumulators.first = moved(accumulators.first, over_step, data.first);
    accumulators.second = moved(accumulators.second, over_step, data.second);
    accumulators.third = moved(accumulators.third, over_step, data.third);
    accumulators.fourth = moved(accumulators.fourth, over_step, data.fourth);
}

// The masked form, since g++ 12 warns of its own undefined source in the plain one.
template <int index>
KVSTORE_INLINE_FOLD __m128i lane_of(__m512i lanes) {
    return _mm512_maskz_extracti32x4_epi32(0xF, lanes, index);
}

// The inverted checksum of everything taken.
KVSTORE_INLINE_FOLD std::uint32_t finish(const Vectors& accumulators) {
    __m512i one = moved(accumulators.third, factors<8 * vector_bytes>(), accumulators.fourth);
    one = moved(accumulators.second, factors<16 * vector_bytes>(), one);
    one = moved(accumulators.first, factors<24 * vector_bytes>(), one);

    // The lanes but the last are moved to its place.
    constexpr long long low_1 = low_factor(128), low_2 = low_factor(256), low_3 = low_factor(384);
    constexpr long long high_1 = high_factor(128), high_2 = high_factor(256), high_3 = high_factor(384);
    const __m512i to_last = _mm512_set_epi64(0, 0, high_1, low_1, high_2, low_2, high_3, low_3);
    const __m512i last = _mm512_maskz_mov_epi64(0xC0, one);
    const __m512i in_place = moved(one, to_last, last);
    const __m128i lane = _mm_xor_si128(_mm_xor_si128(lane_of<0>(in_place), lane_of<1>(in_place)),
                                       _mm_xor_si128(lane_of<2>(in_place), lane_of<3>(in_place)));
    // The instruction takes a message's remainder: with an initial state of 0, that is lane(x) x^32 modulo P.
    const std::uint64_t low_half = _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(lane)));
    return static_cast<std::uint32_t>(
        _mm_crc32_u64(low_half, static_cast<std::uint64_t>(_mm_extract_epi64(lane, 1))));
}

}  // namespace kvstore::crc32c_fold

#endif
