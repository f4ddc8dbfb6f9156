// What this CPU offers, asked once at run time. No file is compiled for more than the platform's baseline.
#pragma once

#include <cstddef>

namespace kvstore {

struct CpuFeatures {
    const char* architecture;  // "x86_64", "aarch64" or "other"
    bool sse42 = false;
    bool pclmul = false;
    bool avx2 = false;
    bool avx512f = false;
    bool vpclmulqdq = false;
};

// Extensions count only where the operating system saves their registers too.
CpuFeatures detect_cpu_features();

// Bytes of the largest cache that the system reports; 32 MiB where it reports none.
std::size_t last_level_cache_bytes();

}  // namespace kvstore
