#include "../cpu.h"

#include "../checksum/crc32c.h"
#include "../copy/copy_kernels.h"
#include "bindings.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

const char* compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

nb::dict describe() {
    const CpuFeatures cpu = detect_cpu_features();
    const Crc32cPath& path = active_crc32c_path();
    const CopyPath& copy = active_copy_path();
    nb::dict features;
    features["version"] = KVSTORE_VERSION;
    features["compiler"] = compiler();
#if defined(Py_LIMITED_API)
    features["stable_abi"] = true;
#else
    features["stable_abi"] = false;
#endif
    features["architecture"] = cpu.architecture;
    features["sse42"] = cpu.sse42;
    features["pclmul"] = cpu.pclmul;
    features["avx2"] = cpu.avx2;
    features["avx512f"] = cpu.avx512f;
    features["vpclmulqdq"] = cpu.vpclmulqdq;
    features["crc32c"] = path.name.c_str();
    features["crc32c_why_not_better"] = path.why_not_better.c_str();
    features["copy"] = copy.name.c_str();
    features["copy_why_not_better"] = copy.why_not_better.c_str();
    features["copy_is_fused"] = active_copy_kernels().is_fused();
    features["copy_stream_bytes"] = stream_bytes_min();
    return features;
}

}  // namespace

void bind_cpu(nb::module_& module) {
    module.def("cpu_features", &describe,
               nb::sig("def cpu_features() -> dict[str, str | bool | int]"),
               "What this CPU offers, which code paths are in use and, where there is one, why not a better one.");
}

}  // namespace kvstore::bindings
