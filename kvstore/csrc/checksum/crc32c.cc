#include "crc32c.h"

#include <cstdlib>
#include <stdexcept>

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

Crc32cPath sse42_path() {
#if defined(__x86_64__)
    return {"sse42", &crc32c_sse42, ""};
#else
    throw std::runtime_error("the sse42 path was not compiled for this architecture");
#endif
}

}  // namespace

Crc32cPath choose_crc32c_path(const CpuFeatures& cpu, std::optional<std::string_view> forced) {
    const std::string missing = missing_for_sse42(cpu);
    if (!forced) {
        return missing.empty() ? sse42_path() : Crc32cPath{"portable", &crc32c_portable, missing};
    }
    if (*forced == "portable") {
        return {"portable", &crc32c_portable, "KVSTORE_CRC32C=portable forces it"};
    }
    if (*forced != "sse42") {
        throw std::runtime_error("KVSTORE_CRC32C=" + std::string(*forced) +
                                 " names no checksum path; use 'sse42' or 'portable', or unset it");
    }
    if (!missing.empty()) {
        throw std::runtime_error("KVSTORE_CRC32C=sse42 cannot be used: " + missing +
                                 "; use 'portable', or unset it to let kvstore choose");
    }
    return sse42_path();
}

const Crc32cPath& active_crc32c_path() {
    static const Crc32cPath path = [] {
        const char* forced = std::getenv("KVSTORE_CRC32C");
        const bool is_set = forced != nullptr && *forced != '\0';
        return choose_crc32c_path(detect_cpu_features(),
                                  is_set ? std::optional<std::string_view>(forced) : std::nullopt);
    }();
    return path;
}

}  // namespace kvstore
