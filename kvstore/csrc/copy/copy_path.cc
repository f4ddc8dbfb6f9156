#include "copy_path.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "../forced_path.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstore {
namespace {

std::string missing_for(const char* path, const CpuFeatures& cpu, bool has_it, const char* extension) {
    if (std::string_view(cpu.architecture) != "x86_64") {
        return std::string("the ") + path + " path needs x86_64, this is " + cpu.architecture;
    }
    return has_it ? "" : std::string("this CPU has no ") + extension;
}

}  // namespace

void stream_portable(std::byte* destination, const std::byte* source, std::size_t size_bytes) {
    std::memcpy(destination, source, size_bytes);
}

void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

CopyPath choose_copy_path(const CpuFeatures& cpu, std::optional<std::string_view> forced) {
    const std::array<PathOffer, 3> offers{{
        {"avx512", missing_for("avx512", cpu, cpu.avx512f, "AVX-512F")},
        {"avx2", missing_for("avx2", cpu, cpu.avx2, "AVX2")},
        {"portable", ""},
    }};
    const PathChoice choice = choose_path(offers, "KVSTORE_COPY", "copy", forced);
#if defined(__x86_64__)
    if (choice.name == "avx512") {
        return {choice.name, &stream_avx512, choice.why_not_better};
    }
    if (choice.name == "avx2") {
        return {choice.name, &stream_avx2, choice.why_not_better};
    }
#endif
    return {choice.name, &stream_portable, choice.why_not_better};
}

const CopyPath& active_copy_path() {
    static const CopyPath path = choose_copy_path(detect_cpu_features(), forced_by("KVSTORE_COPY"));
    return path;
}

std::size_t stream_bytes_min() {
    constexpr std::size_t least_bytes = 1 << 20;
    constexpr std::size_t most_bytes = 4 << 20;
    static const std::size_t bytes = std::clamp(last_level_cache_bytes() / 8, least_bytes, most_bytes);
    return bytes;
}

}  // namespace kvstore
