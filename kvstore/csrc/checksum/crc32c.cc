#include "crc32c.h"

#include <array>

#include "../forced_path.h"

namespace kvstore {
namespace {

std::string missing_for_sse42(const CpuFeatures& cpu) {
    if (std::string_view(cpu.architecture) != "x86_64") {
        return std::string("the sse42 path needs x86_64, this is ") + cpu.architecture;
    }
    if (!cpu.sse42) {
        return "this CPU has no SSE4.2";
    }
    if (!cpu.pclmul) {
        return "this CPU has no PCLMULQDQ";
    }
    return "";
}

std::string missing_for_avx512(const CpuFeatures& cpu) {
    if (std::string_view(cpu.architecture) != "x86_64") {
        return std::string("the avx512 path needs x86_64, this is ") + cpu.architecture;
    }
    if (!cpu.avx512f) {
        return "this CPU has no AVX-512F";
    }
    if (!cpu.vpclmulqdq) {
        return "this CPU has no VPCLMULQDQ";
    }
    return missing_for_sse42(cpu);
}

}  // namespace

Crc32cPath choose_crc32c_path(const CpuFeatures& cpu, std::optional<std::string_view> forced) {
    const std::array<PathOffer, 3> offers{{
        {"avx512", missing_for_avx512(cpu)},
        {"sse42", missing_for_sse42(cpu)},
        {"portable", ""},
    }};
    const PathChoice choice = choose_path(offers, "KVSTORE_CRC32C", "checksum", forced);
#if defined(__x86_64__)
    if (choice.name == "avx512") {
        return {choice.name, &crc32c_avx512, choice.why_not_better};
    }
    if (choice.name == "sse42") {
        return {choice.name, &crc32c_sse42, choice.why_not_better};
    }
#endif
    return {choice.name, &crc32c_portable, choice.why_not_better};
}

const Crc32cPath& active_crc32c_path() {
    static const Crc32cPath path = choose_crc32c_path(detect_cpu_features(), forced_by("KVSTORE_CRC32C"));
    return path;
}

}  // namespace kvstore
