// What this CPU offers, asked once at run time. No file is compiled for more than the platform's baseline.
#pragma once

namespace kvstore {

struct CpuFeatures {
    const char* architecture;  // "x86_64", "aarch64" or "other"
    bool sse42;
    bool pclmul;
};

CpuFeatures detect_cpu_features();

}  // namespace kvstore
