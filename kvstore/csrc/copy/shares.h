// Work that several threads share, a stretch at a time.
#pragma once

#include <cstddef>
#include <functional>

namespace kvstore {

// Threads that all calls of the process together may have beside their callers.
inline constexpr unsigned helper_threads_max = 16;

// Calls work(0) to work(shares - 1), each once, from this thread and up to `threads` - 1 others; from fewer where
// `helper_threads_max` is reached or the system gives none. Returns when all calls have returned, and waits for no thread
// that has no share: one that the system runs late ends by itself. `work` must not throw.
void run_shares(std::size_t shares, unsigned threads, const std::function<void(std::size_t)>& work);

}  // namespace kvstore
