// Random allocations against a simple model: bytes survive relocation, pins hold, and promises are kept.
#include "../arena/arena.h"

#include <algorithm>
#include <cstring>
#include <iostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../arena/slab_allocator.h"
#include "../arena/slab_size.h"
#include "check.h"

namespace kvstore {
namespace {

using testing::check;
using testing::throws;

struct Held {
    SlotHandle slot;
    unsigned char fill;
    unsigned pins = 0;
    std::uint64_t pinned_at = 0;
};

struct Setup {
    std::uint64_t pages;
    std::uint64_t slab_pages;
};

// Memory for slots, page-aligned or not: the allocator counts from its beginning.
struct Space {
    explicit Space(const Setup& setup)
        : bytes(setup.pages * page_bytes), slots(bytes.data(), bytes.size(), setup.slab_pages * page_bytes) {}

    void fill(const Held& held) { std::memset(bytes.data() + slots.offset(held.slot), held.fill, held.slot.size_bytes); }

    bool holds(const Held& held) const {
        const std::byte* begin = bytes.data() + slots.offset(held.slot);
        return std::all_of(begin, begin + held.slot.size_bytes,
                           [&](std::byte value) { return value == static_cast<std::byte>(held.fill); });
    }

    std::vector<std::byte> bytes;
    SlabAllocator slots;
};

void check_no_overlap(const Space& space, const std::vector<Held>& held) {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
    for (const Held& each : held) {
        const std::uint64_t begin = space.slots.offset(each.slot);
        ranges.emplace_back(begin, begin + each.slot.size_bytes);
    }
    std::sort(ranges.begin(), ranges.end());
    for (std::size_t i = 1; i < ranges.size(); ++i) {
        check(ranges[i - 1].second <= ranges[i].first, "two slots overlap");
    }
    check(ranges.empty() || ranges.back().second <= space.bytes.size(), "a slot lies outside");
}

// Answers that came out, so that a run that never relocated or never refused is noticed.
struct Seen {
    int fitted = 0;
    int refused = 0;
    int quarantined = 0;
    std::uint64_t relocated_bytes = 0;
};

Seen random_operations(const Setup& setup, unsigned seed, int rounds) {
    std::mt19937 random(seed);
    const auto below = [&](std::size_t limit) { return random() % std::max<std::size_t>(limit, 1); };
    Space space(setup);
    std::vector<Held> held;
    std::vector<Held> quarantined;
    Seen seen;
    for (int round = 0; round < rounds; ++round) {
        // Demand shifts from one set of sizes to another, as it does between record classes.
        const std::uint64_t sizes_at_once = 1 + below(3);
        std::vector<std::uint64_t> sizes;
        for (std::size_t count = below(9); count-- > 0;) {
            sizes.push_back(page_bytes * (1 + (static_cast<std::uint64_t>(round) / 60 + below(sizes_at_once)) %
                                                  setup.slab_pages));
        }
        std::vector<SlotHandle> freeing;
        std::vector<Held> kept;
        const std::size_t share = 2 + below(20);
        for (const Held& each : held) {
            (below(share) == 0 ? freeing.push_back(each.slot) : kept.push_back(each));
        }
        const std::uint64_t used = space.slots.used_bytes();
        const bool promised = space.slots.would_fit(sizes, freeing);
        check(space.slots.used_bytes() == used, "asking changed something");
        for (const Held& each : held) {
            if (std::none_of(kept.begin(), kept.end(), [&](const Held& k) { return k.slot.index == each.slot.index; })) {
                if (each.pins != 0) {
                    quarantined.push_back(each);
                }
                space.slots.free(each.slot);
                check(throws<StaleSlot>([&] { space.slots.free(each.slot); }, "match again"), "freed twice");
            }
        }
        held = kept;
        std::vector<SlotHandle> slots;
        const bool fits = space.slots.allocate(sizes, slots);
        check(fits == promised, "seed " + std::to_string(seed) + ", round " + std::to_string(round) + ": promised " +
                                    std::to_string(promised) + ", got " + std::to_string(fits));
        check(slots.size() == (fits ? sizes.size() : 0), "all or none");
        ++(fits ? seen.fitted : seen.refused);
        for (std::size_t i = 0; i < slots.size(); ++i) {
            check(slots[i].size_bytes == sizes[i], "a slot of another size");
            held.push_back({slots[i], static_cast<unsigned char>(1 + below(255))});
            space.fill(held.back());
        }
        for (Held& each : held) {
            check(each.pins == 0 || space.slots.offset(each.slot) == each.pinned_at, "a pinned slot moved");
            if (each.pins == 0 ? below(12) == 0 : below(6) == 0) {
                space.slots.pin(each.slot);
                each.pinned_at = space.slots.offset(each.slot);
                ++each.pins;
            } else if (each.pins != 0 && below(2) == 0) {
                space.slots.unpin(each.slot);
                --each.pins;
            }
        }
        for (std::size_t i = quarantined.size(); i-- > 0;) {
            // Late writes land where they were meant to, and so in nobody's slot.
            std::memset(space.bytes.data() + quarantined[i].pinned_at, 0, quarantined[i].slot.size_bytes);
            ++seen.quarantined;
            if (below(3) == 0) {
                for (; quarantined[i].pins != 0; --quarantined[i].pins) {
                    space.slots.unpin(quarantined[i].slot);
                }
                check(throws<StaleSlot>([&] { space.slots.unpin(quarantined[i].slot); }, "not pinned"), "unpinned");
                quarantined.erase(quarantined.begin() + static_cast<std::ptrdiff_t>(i));
            }
        }
        std::uint64_t live_bytes = 0;
        for (const Held& each : held) {
            check(space.holds(each), "bytes changed");
            live_bytes += each.slot.size_bytes;
        }
        std::uint64_t quarantined_bytes = 0;
        for (const Held& each : quarantined) {
            quarantined_bytes += each.slot.size_bytes;
        }
        check(space.slots.quarantined_bytes() == quarantined_bytes, "quarantined bytes");
        check(space.slots.used_bytes() == live_bytes + quarantined_bytes, "used bytes");
        space.slots.check();
        check_no_overlap(space, held);
    }
    seen.relocated_bytes = space.slots.relocated_bytes();
    return seen;
}

void against_the_model() {
    Seen all;
    for (const Setup& setup : {Setup{64, 8}, Setup{67, 8}, Setup{40, 13}, Setup{12, 12}, Setup{128, 6}, Setup{7, 3}}) {
        for (unsigned seed = 0; seed < 6; ++seed) {
            const Seen seen = random_operations(setup, seed, 400);
            all.fitted += seen.fitted;
            all.refused += seen.refused;
            all.quarantined += seen.quarantined;
            all.relocated_bytes += seen.relocated_bytes;
        }
    }
    check(all.fitted > 1000 && all.refused > 100 && all.quarantined > 100 && all.relocated_bytes > 100 * page_bytes,
          "the random operations missed something: " + std::to_string(all.fitted) + " fitted, " +
              std::to_string(all.refused) + " refused, " + std::to_string(all.quarantined) + " quarantined, " +
              std::to_string(all.relocated_bytes) + " bytes moved");
}

std::vector<SlotHandle> take(SlabAllocator& slots, std::size_t count, std::uint64_t size_bytes) {
    std::vector<SlotHandle> taken;
    check(slots.allocate(std::vector<std::uint64_t>(count, size_bytes), taken), "no room");
    return taken;
}

void relocation_makes_room_for_another_class() {
    Space space({32, 4});
    std::vector<SlotHandle> small = take(space.slots, 32, page_bytes);
    std::vector<Held> held;
    // Every other slot goes: half of the memory is free, and no slab is.
    for (std::size_t i = 0; i < small.size(); ++i) {
        if (i % 2 == 0) {
            space.slots.free(small[i]);
        } else {
            held.push_back({small[i], static_cast<unsigned char>(i)});
            space.fill(held.back());
        }
    }
    check(space.slots.empty_slabs() == 0, "a slab is empty");
    const std::vector<std::uint64_t> four_large(4, 4 * page_bytes);
    const std::vector<std::uint64_t> five_large(5, 4 * page_bytes);
    check(space.slots.would_fit(four_large, {}) && !space.slots.would_fit(five_large, {}), "promises");
    std::vector<SlotHandle> large;
    check(!space.slots.allocate(four_large, large, false) && large.empty(), "moved without leave");
    check(space.slots.relocated_bytes() == 0, "a refusal moved something");
    check(space.slots.allocate(four_large, large), "no room after relocation");
    check(space.slots.relocated_bytes() == 8 * page_bytes, "moved more than needed");
    for (const Held& each : held) {
        check(space.holds(each), "bytes changed");
    }
    space.slots.check();
}

void pinned_slots_stay() {
    Space space({16, 4});
    std::vector<SlotHandle> small = take(space.slots, 16, page_bytes);
    for (std::size_t i = 0; i < small.size(); ++i) {
        if (i % 4 == 0) {
            space.slots.pin(small[i]);  // one in each slab
        } else {
            space.slots.free(small[i]);
        }
    }
    const std::vector<std::uint64_t> one_large(1, 4 * page_bytes);
    std::vector<SlotHandle> large;
    check(!space.slots.would_fit(one_large, {}) && !space.slots.allocate(one_large, large), "pinned slots moved");
    const std::uint64_t offset = space.slots.offset(small[0]);
    space.slots.unpin(small[4]);
    check(space.slots.allocate(one_large, large), "the slab whose slot was unpinned");
    check(space.slots.offset(small[0]) == offset, "a pinned slot moved");
    // Freed while pinned, a slot makes no room yet.
    const std::vector<SlotHandle> freeing{small[0]};
    check(!space.slots.would_fit(one_large, freeing), "quarantined room was promised");
    space.slots.free(small[0]);
    check(space.slots.quarantined_bytes() == page_bytes, "not quarantined");
    check(throws<StaleSlot>([&] { space.slots.pin(small[0]); }, "generation 0"), "pinned a freed slot");
    space.slots.unpin(small[0]);
    check(space.slots.quarantined_bytes() == 0, "still quarantined");
    check(throws<StaleSlot>([&] { space.slots.unpin(small[0]); }, "not pinned"), "unpinned once more");
}

void a_slot_named_twice_is_refused() {
    Space space({8, 4});
    const std::vector<SlotHandle> taken = take(space.slots, 1, page_bytes);
    const std::vector<SlotHandle> twice{taken[0], taken[0]};
    check(throws<StaleSlot>([&] { space.slots.would_fit({}, twice); }, "named twice"), "named twice");
    check(space.slots.would_fit({}, taken), "a simulation left a mark");
}

void what_can_never_fit() {
    Space space({10, 4});
    const std::vector<std::uint64_t> fits{4 * page_bytes, 4 * page_bytes, 2 * page_bytes};
    const std::vector<std::uint64_t> too_many{4 * page_bytes, 4 * page_bytes, 3 * page_bytes};
    const std::vector<std::uint64_t> too_large{5 * page_bytes};
    check(space.slots.fits_when_empty(fits), "the short slab was not used");
    check(!space.slots.fits_when_empty(too_many) && !space.slots.fits_when_empty(too_large), "promised too much");
    take(space.slots, 6, page_bytes);
    check(space.slots.fits_when_empty(fits), "what is there counted");
}

void slab_sizes() {
    const std::uint64_t mib = std::uint64_t{1} << 20;
    const std::uint64_t gib = std::uint64_t{1} << 30;
    for (const std::uint64_t capacity : {std::uint64_t{0}, std::uint64_t{4095}, 7 * page_bytes, mib, gib, 100 * gib}) {
        for (const std::uint64_t largest : {page_bytes, 3 * page_bytes, mib + page_bytes, 64 * mib + 64 * page_bytes}) {
            const std::vector<std::uint64_t> sizes{page_bytes, 2 * page_bytes, largest};
            const std::uint64_t slab = choose_slab_bytes(capacity, largest, sizes);
            check(slab % page_bytes == 0 && slab <= capacity, "a slab of whole pages within the capacity");
            check(slab >= std::min(largest, capacity / page_bytes * page_bytes), "the largest slot fits");
            check(slab <= std::max(largest, slab_bytes_preferred_max), "moves are bounded");
            check(capacity < 64 * largest || capacity / slab >= 16, "a large arena has many slabs");
        }
    }
    // Sizes that are known divide a slab with little left over.
    const std::vector<std::uint64_t> sizes{257 * page_bytes, 33 * page_bytes};
    const std::uint64_t slab = choose_slab_bytes(gib, sizes[0], sizes);
    for (const std::uint64_t size : sizes) {
        check(slab % size * 20 < slab, "more than a twentieth is left over");
    }
}

void closed_arenas() {
    auto memory = SharedMemory::anonymous(8 * page_bytes);
    std::byte* data = memory->data();
    Arena arena(std::move(memory), 8 * page_bytes, 4 * page_bytes);
    std::vector<SlotHandle> slots;
    check(arena.allocate(std::vector<std::uint64_t>{page_bytes}, slots, true), "no room");
    const std::shared_ptr<SharedMemory> kept = arena.memory();
    arena.close();
    arena.close();
    data[arena_header_bytes] = std::byte{1};  // whoever keeps the memory may go on looking at it
    check(kept->descriptor() < 0, "the descriptor is open");
    check(throws<StaleSlot>([&] { arena.pin(slots); }, "closed"), "pinned in a closed arena");
    check(throws<ArenaClosed>([&] { arena.allocate(std::vector<std::uint64_t>{page_bytes}, slots, true); }, "open"),
          "allocated in a closed arena");
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::against_the_model();
    kvstore::relocation_makes_room_for_another_class();
    kvstore::pinned_slots_stay();
    kvstore::a_slot_named_twice_is_refused();
    kvstore::what_can_never_fit();
    kvstore::slab_sizes();
    kvstore::closed_arenas();
    std::cout << "arena: passed\n";
}
