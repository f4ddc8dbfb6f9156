// How bytes are copied: one contiguous range at a time, by the widest stores that the CPU has.
//
// An ordinary copy is memcpy on every path. A *streaming* copy writes with non-temporal stores, past the caches: the
// destination is not read into them first and pushes nothing out of them. It is the faster one for what is larger than
// the caches, and the wrong one for what is read again at once.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "../cpu.h"

namespace kvstore {

using StreamFunction = void (*)(std::byte* destination, const std::byte* source, std::size_t size_bytes);

// memcpy. For platforms without non-temporal stores.
void stream_portable(std::byte* destination, const std::byte* source, std::size_t size_bytes);

// Any alignment; parts of cache lines at both ends are stored in the ordinary way. What was streamed is ordered against
// other threads by stream_fence() only. REQUIRES: AVX2, or AVX-512F. Not defined where x86-64 is not the target.
void stream_avx2(std::byte* destination, const std::byte* source, std::size_t size_bytes);
void stream_avx512(std::byte* destination, const std::byte* source, std::size_t size_bytes);

// Everything that this thread has streamed becomes visible before what it stores next.
void stream_fence();

struct CopyPath {
    std::string name;  // "avx512", "avx2" or "portable"
    StreamFunction stream;
    std::string why_not_better;  // empty when this is the best path there is
};

// The path for a CPU. `forced` ("avx512", "avx2", "portable") overrides the choice.
// Throws std::runtime_error when the forced path is unknown or this CPU cannot run it.
CopyPath choose_copy_path(const CpuFeatures& cpu, std::optional<std::string_view> forced);

// The path of this process: chosen on the first call from the CPU and the environment variable KVSTORE_COPY.
const CopyPath& active_copy_path();

// Plans of at least this many bytes stream unless the caller says otherwise: an eighth of the last-level cache, and from
// 1 to 4 MiB. Less may still lie there when it is read again; more pushes out what others have there. The upper bound is
// for large processors, whose cache has as many users as cores.
std::size_t stream_bytes_min();

}  // namespace kvstore
