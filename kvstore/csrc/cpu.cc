#include "cpu.h"

#include <unistd.h>

#include <algorithm>

namespace kvstore {

CpuFeatures detect_cpu_features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return {"x86_64",
            __builtin_cpu_supports("sse4.2") != 0,
            __builtin_cpu_supports("pclmul") != 0,
            __builtin_cpu_supports("avx2") != 0,
            __builtin_cpu_supports("avx512f") != 0,
            __builtin_cpu_supports("vpclmulqdq") != 0};
#elif defined(__aarch64__)
    return {"aarch64"};
#else
    return {"other"};
#endif
}

std::size_t last_level_cache_bytes() {
    constexpr std::size_t assumed_bytes = 32 << 20;
    long largest = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    largest = std::max(sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
    return largest > 0 ? static_cast<std::size_t>(largest) : assumed_bytes;
}

}  // namespace kvstore
