// Memory that runs out when a test says so. For one file of a program only: it replaces operator new.
#pragma once

#include <cstdlib>
#include <new>
#include <optional>

namespace kvstore::testing {

// Allocations of this thread until one fails; none does while there is no number.
inline thread_local std::optional<int> allocations_left;

}  // namespace kvstore::testing

// All forms, since a sanitizer would bring its own of those that are not here. Inlined, g++ takes them for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t& /*unused*/) noexcept {
    auto& left = kvstore::testing::allocations_left;
    if (left && (*left)-- == 0) {
        left.reset();
        return nullptr;
    }
    return std::malloc(size == 0 ? 1 : size);
}

[[gnu::noinline]] void* operator new(std::size_t size) {
    if (void* memory = operator new(size, std::nothrow)) {
        return memory;
    }
    throw std::bad_alloc();
}

[[gnu::noinline]] void* operator new[](std::size_t size) { return operator new(size); }

[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
