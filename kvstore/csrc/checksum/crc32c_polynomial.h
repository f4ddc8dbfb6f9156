// Arithmetic modulo the reflected CRC32C polynomial, at compile time: bit i of a value is the coefficient of x^(31-i).
#pragma once

#include <cstdint>

namespace kvstore::crc32c_polynomial {

inline constexpr std::uint32_t polynomial = 0x82F63B78;
inline constexpr std::uint32_t one = 0x80000000;

constexpr std::uint32_t times_x(std::uint32_t value) {
    return (value >> 1) ^ ((value & 1) != 0 ? polynomial : 0);
}

constexpr std::uint32_t product(std::uint32_t a, std::uint32_t b) {
    std::uint32_t result = 0;
    for (std::uint32_t coefficient = one; coefficient != 0; coefficient >>= 1) {
        if ((a & coefficient) != 0) {
            result ^= b;
        }
        b = times_x(b);
    }
    return result;
}

// x^exponent
constexpr std::uint32_t power_of_x(std::uint64_t exponent) {
    std::uint32_t result = one;
    for (std::uint32_t square = times_x(one); exponent != 0; exponent >>= 1) {
        if ((exponent & 1) != 0) {
            result = product(result, square);
        }
        square = product(square, square);
    }
    return result;
}

}  // namespace kvstore::crc32c_polynomial
