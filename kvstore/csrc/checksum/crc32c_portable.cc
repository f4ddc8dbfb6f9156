#include <array>
#include <bit>
#include <cstring>

#include "crc32c.h"
#include "crc32c_polynomial.h"

namespace kvstore {
namespace {

constexpr std::size_t slices = 8;
using Tables = std::array<std::array<std::uint32_t, 256>, slices>;

// tables[k][b]: the checksum state after byte b followed by k zero bytes.
constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t state = byte;
        for (int bit = 0; bit < 8; ++bit) {
            state = crc32c_polynomial::times_x(state);
        }
        tables[0][byte] = state;
    }
    for (std::size_t slice = 1; slice < slices; ++slice) {
        for (std::size_t byte = 0; byte < 256; ++byte) {
            const std::uint32_t state = tables[slice - 1][byte];
            tables[slice][byte] = tables[0][state & 0xFF] ^ (state >> 8);
        }
    }
    return tables;
}

constexpr Tables tables = make_tables();

std::uint64_t load_little_endian(const unsigned char* data) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof word);
    if constexpr (std::endian::native == std::endian::big) {
        word = __builtin_bswap64(word);
    }
    return word;
}

}  // namespace

std::uint32_t crc32c_portable(const void* data, std::size_t size_bytes, std::uint32_t value) {
    const auto* next = static_cast<const unsigned char*>(data);
    std::uint32_t state = ~value;
    for (; size_bytes >= slices; size_bytes -= slices, next += slices) {
        const std::uint64_t word = load_little_endian(next) ^ state;
        state = 0;
        for (std::size_t slice = 0; slice < slices; ++slice) {
            state ^= tables[slices - 1 - slice][(word >> (8 * slice)) & 0xFF];
        }
    }
    for (; size_bytes > 0; --size_bytes, ++next) {
        state = tables[0][(state ^ *next) & 0xFF] ^ (state >> 8);
    }
    return ~state;
}

}  // namespace kvstore
