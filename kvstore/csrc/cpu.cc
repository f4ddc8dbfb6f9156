#include "cpu.h"

namespace kvstore {

CpuFeatures detect_cpu_features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return {"x86_64", __builtin_cpu_supports("sse4.2") != 0, __builtin_cpu_supports("pclmul") != 0};
#elif defined(__aarch64__)
    return {"aarch64", false, false};
#else
    return {"other", false, false};
#endif
}

}  // namespace kvstore
