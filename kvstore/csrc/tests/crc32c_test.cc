#include "checksum/crc32c.h"

#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "checksum/crc32c_polynomial.h"

namespace kvstore {
namespace {

using testing::check;
using testing::throws;

// The definition, one bit at a time: shares nothing with the paths under test but the polynomial.
std::uint32_t crc32c_by_definition(const unsigned char* data, std::size_t size_bytes, std::uint32_t value) {
    std::uint32_t state = ~value;
    for (std::size_t i = 0; i < size_bytes; ++i) {
        state ^= data[i];
        for (int bit = 0; bit < 8; ++bit) {
            state = (state >> 1) ^ ((state & 1) != 0 ? 0x82F63B78u : 0u);
        }
    }
    return ~state;
}

std::vector<Crc32cPath> paths_of_this_cpu() {
    const CpuFeatures cpu = detect_cpu_features();
    std::vector<Crc32cPath> paths;
    for (const char* name : {"portable", "sse42", "avx512"}) {
        try {
            paths.push_back(choose_crc32c_path(cpu, name));
        } catch (const std::runtime_error& error) {
            std::cout << "crc32c " << name << ": skipped, " << error.what() << "\n";
        }
    }
    return paths;
}

void rfc_3720_vectors(const Crc32cPath& path) {
    std::array<unsigned char, 32> bytes{};
    check(path.function(bytes.data(), bytes.size(), 0) == 0x8A9136AA, path.name + ": 32 bytes of zeros");
    bytes.fill(0xFF);
    check(path.function(bytes.data(), bytes.size(), 0) == 0x62A8AB43, path.name + ": 32 bytes of ones");
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<unsigned char>(i);
    }
    check(path.function(bytes.data(), bytes.size(), 0) == 0x46DD794E, path.name + ": 32 incrementing bytes");
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<unsigned char>(31 - i);
    }
    check(path.function(bytes.data(), bytes.size(), 0) == 0x113FDB5C, path.name + ": 32 decrementing bytes");
    check(path.function("123456789", 9, 0) == 0xE3069283, path.name + ": check value");
    check(path.function(bytes.data(), 0, 0x1234) == 0x1234, path.name + ": nothing changes nothing");
}

// The memory ends with the data, so that the address sanitizer sees a read past it.
void agrees_with_definition(const Crc32cPath& path, std::mt19937_64& random) {
    const std::vector<std::size_t> edges{1,    7,    8,    63,   191,  192,  193,   255,   256,   257,  1023,
                                         1024, 1025, 1279, 1280, 1281, 1535, 1536, 12287, 12288, 12289, 26000};
    for (int round = 0; round < 200; ++round) {
        const auto case_number = static_cast<std::size_t>(round);
        const std::size_t size = case_number < edges.size() ? edges[case_number] : random() % 30000;
        const std::size_t skip = random() % 64;
        const auto memory = std::make_unique<unsigned char[]>(skip + size);
        for (std::size_t i = 0; i < skip + size; ++i) {
            memory[i] = static_cast<unsigned char>(random());
        }
        const unsigned char* data = memory.get() + skip;
        const auto start = static_cast<std::uint32_t>(random());
        const std::uint32_t expected = crc32c_by_definition(data, size, start);
        check(path.function(data, size, start) == expected, path.name + ": " + std::to_string(size) + " bytes");
        const std::size_t cut = size == 0 ? 0 : random() % size;
        check(path.function(data + cut, size - cut, path.function(data, cut, start)) == expected,
              path.name + ": continued at " + std::to_string(cut) + " of " + std::to_string(size));
    }
}

void powers_of_x() {
    using namespace crc32c_polynomial;
    static_assert(power_of_x(0) == one);
    static_assert(power_of_x(32) == polynomial);
    std::uint32_t stepped = one;
    for (std::uint64_t exponent = 0; exponent < 2000; ++exponent) {
        check(power_of_x(exponent) == stepped, "x^" + std::to_string(exponent));
        stepped = times_x(stepped);
    }
}

void choice_of_path() {
    const CpuFeatures none{"x86_64"};
    const CpuFeatures no_multiply{.architecture = "x86_64", .sse42 = true};
    const CpuFeatures no_folding{.architecture = "x86_64", .sse42 = true, .pclmul = true, .avx512f = true};
    const CpuFeatures other{"aarch64"};
    check(choose_crc32c_path(none, std::nullopt).why_not_better ==
              "this CPU has no AVX-512F; this CPU has no SSE4.2",
          "reasons: AVX-512F, SSE4.2");
    check(choose_crc32c_path(no_multiply, std::nullopt).name == "portable", "SSE4.2 alone is not enough");
    check(choose_crc32c_path(no_folding, std::nullopt).name == "sse42", "AVX-512F alone is not enough");
    check(choose_crc32c_path(no_folding, std::nullopt).why_not_better == "this CPU has no VPCLMULQDQ",
          "reason: VPCLMULQDQ");
    check(choose_crc32c_path(other, std::nullopt).name == "portable", "other architectures use the portable path");
    for (const CpuFeatures& cpu : {none, no_multiply, other}) {
        for (const char* name : {"sse42", "avx512"}) {
            check(throws<std::runtime_error>([&] { choose_crc32c_path(cpu, name); }, "cannot be used"),
                  "a forced path that the CPU cannot run is refused");
        }
    }
    check(throws<std::runtime_error>([&] { choose_crc32c_path(none, "sse"); }, "names no checksum path"),
          "an unknown path is refused");
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::powers_of_x();
    kvstore::choice_of_path();
    std::mt19937_64 random(3720);
    for (const kvstore::Crc32cPath& path : kvstore::paths_of_this_cpu()) {
        kvstore::rfc_3720_vectors(path);
        kvstore::agrees_with_definition(path, random);
        std::cout << "crc32c " << path.name << ": passed\n";
    }
}
