#include "cpu.h"

#include <algorithm>
#include <fstream>
#include <string>

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

// From the kernel's own description rather than sysconf, which on some processors adds up caches that no core shares.
std::size_t last_level_cache_bytes() {
    constexpr std::size_t assumed_bytes = 32 << 20;
    constexpr int levels_max = 8;
    std::size_t largest = 0;
    for (int index = 0; index < levels_max; ++index) {
        std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
        std::size_t size = 0;
        char unit = ' ';
        if (file >> size >> unit) {
            largest = std::max(largest, size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0));
        }
    }
    return largest > 0 ? largest : assumed_bytes;
}

}  // namespace kvstore
