// CRC32C (Castagnoli polynomial 0x1EDC6F41, reflected; RFC 3720, appendix B.4 has test vectors).
//
// A value continues another: crc32c(b, size_b, crc32c(a, size_a, 0)) is the checksum of a followed by b.
// All paths return the same values for all sizes and alignments. Any thread may call any of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../cpu.h"

namespace kvstore {

using Crc32cFunction = std::uint32_t (*)(const void* data, std::size_t size_bytes, std::uint32_t value);

// Slicing-by-8 tables; runs on every CPU.
std::uint32_t crc32c_portable(const void* data, std::size_t size_bytes, std::uint32_t value);

// REQUIRES: a CPU with SSE4.2 and PCLMULQDQ. Where the compiler does not target x86-64 it is not defined.
std::uint32_t crc32c_sse42(const void* data, std::size_t size_bytes, std::uint32_t value);

// REQUIRES: a CPU with AVX-512F, VPCLMULQDQ, PCLMULQDQ and SSE4.2. Where the compiler does not target x86-64 it is not
// defined.
std::uint32_t crc32c_avx512(const void* data, std::size_t size_bytes, std::uint32_t value);

struct Crc32cPath {
    std::string name;  // "avx512", "sse42" or "portable"
    Crc32cFunction function;
    std::string why_not_better;  // empty when this is the best path there is
};

// The path for a CPU. `forced` ("avx512", "sse42", "portable") overrides the choice.
// Throws std::runtime_error when the forced path is unknown or this CPU cannot run it.
Crc32cPath choose_crc32c_path(const CpuFeatures& cpu, std::optional<std::string_view> forced);

// The path of this process: chosen on the first call from the CPU and the environment variable KVSTORE_CRC32C.
const Crc32cPath& active_crc32c_path();

inline std::uint32_t crc32c(const void* data, std::size_t size_bytes, std::uint32_t value = 0) {
    return active_crc32c_path().function(data, size_bytes, value);
}

}  // namespace kvstore
