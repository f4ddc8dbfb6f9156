// Threads that write, verify and free records of changing sizes while others make the arena relocate; for TSan too.
#include <cstring>
#include <iostream>
#include <random>
#include <thread>
#include <vector>

#include "../arena/arena.h"
#include "../arena/slab_size.h"
#include "check.h"

namespace kvstore {
namespace {

using testing::check;

constexpr int rounds = 600;

struct Record {
    SlotHandle slot;
    std::byte fill;
};

void verify(Arena& arena, const Record& record) {
    std::vector<std::byte> found(record.slot.size_bytes);
    arena.read(record.slot, found.data(), found.size(), 0);
    for (const std::byte value : found) {
        check(value == record.fill, "a record changed");
    }
}

void work(Arena& arena, std::byte* base, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Record> records;
    for (int round = 0; round < rounds; ++round) {
        const std::vector<std::uint64_t> sizes(1 + random() % 3, page_bytes * (1 + random() % 5));
        std::vector<SlotHandle> slots;
        if (arena.allocate(sizes, slots, true)) {
            arena.pin(slots);
            for (const SlotHandle& slot : slots) {
                // In place, as writers do, and through a call.
                records.push_back({slot, static_cast<std::byte>(random())});
                const Record& record = records.back();
                std::memset(base + arena.location(slot, true), static_cast<int>(record.fill), slot.size_bytes / 2);
                const std::vector<std::byte> half(slot.size_bytes / 2, record.fill);
                arena.write(slot, half.data(), half.size(), static_cast<std::int64_t>(half.size()));
            }
            arena.unpin(slots);
        }
        while (!records.empty() && (slots.empty() || random() % 3 == 0)) {
            const std::size_t index = random() % records.size();
            verify(arena, records[index]);
            const std::vector<SlotHandle> gone{records[index].slot};
            check(arena.would_fit(std::vector<std::uint64_t>{}, gone), "nothing always fits");
            arena.free(gone);
            records.erase(records.begin() + static_cast<std::ptrdiff_t>(index));
            if (random() % 4 == 0) {
                break;
            }
        }
    }
    for (const Record& record : records) {
        verify(arena, record);
        arena.free(std::vector<SlotHandle>{record.slot});
    }
}

}  // namespace
}  // namespace kvstore

int main() {
    const std::uint64_t capacity_bytes = 120 * kvstore::page_bytes;
    auto memory = kvstore::SharedMemory::anonymous(capacity_bytes);
    std::byte* base = memory->data();
    kvstore::Arena arena(std::move(memory), capacity_bytes, 10 * kvstore::page_bytes);
    {
        std::vector<std::jthread> threads;
        for (unsigned seed = 0; seed < 4; ++seed) {
            threads.emplace_back([&arena, base, seed] { kvstore::work(arena, base, seed); });
        }
    }
    arena.check();
    const kvstore::ArenaUsage usage = arena.usage(true);
    kvstore::testing::check(usage.used_bytes == 0 && usage.empty_slabs == usage.slabs, "something was left behind");
    kvstore::testing::check(usage.relocated_bytes > 0, "nothing was ever relocated");
    std::cout << "arena_threads: passed\n";
}
