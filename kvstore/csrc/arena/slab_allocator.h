// Slots in slabs: which bytes of an arena belong to which record. Not thread-safe; `Arena` adds the mutex.
//
// Memory is divided into slabs of one size (the last may be shorter). A slab serves one class, that is one slot size,
// while it holds anything, and returns to the common pool when its last slot goes. A class that has no free place and
// finds no empty slab gets one that is emptied for it: slots that nobody has pinned move into free places of their own
// class. A slot is a handle: its place may change while it is unpinned, its index and generation do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "slab_set.h"

namespace kvstore {

// A descriptor of reserved space. It dies with its generation.
struct SlotHandle {
    std::uint64_t index;
    std::uint64_t generation;
    std::uint64_t size_bytes;
};

// A handle names space that has been freed, or is not pinned where it must be.
class StaleSlot : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// What one class has and uses.
struct ClassUsage {
    std::uint64_t slot_bytes;
    std::uint64_t slabs;
    std::uint64_t live_slots;
    std::uint64_t quarantined_slots;
    std::uint64_t free_places;
};

class SlabAllocator {
  public:
    // Divides `capacity_bytes` at `memory`, which relocation copies within. REQUIRES: slab_bytes is a positive
    // multiple of page_bytes unless the capacity is less than a page.
    SlabAllocator(std::byte* memory, std::uint64_t capacity_bytes, std::uint64_t slab_bytes);

    // Appends a slot for each size, in order, or takes nothing and returns false. Sizes are positive multiples of
    // page_bytes; one that is larger than a slab never fits.
    // With `may_move` false, false is also the answer when slots would have to move.
    bool allocate(std::span<const std::uint64_t> sizes_bytes, std::vector<SlotHandle>& slots, bool may_move = true);

    // Whether `allocate` would succeed if `freeing` were freed first, exactly; changes nothing. Pinned slots among
    // them would be quarantined and so make no room. Throws StaleSlot for one that is not live or is named twice.
    bool would_fit(std::span<const std::uint64_t> sizes_bytes, std::span<const SlotHandle> freeing);

    // Whether `allocate` would succeed if nothing were allocated.
    bool fits_when_empty(std::span<const std::uint64_t> sizes_bytes) const;

    // Ends a generation. A pinned slot is quarantined until its last unpin. Throws StaleSlot.
    void free(const SlotHandle& slot);
    // Keeps a live slot where it is. Throws StaleSlot.
    void pin(const SlotHandle& slot);
    // Ends one pin, also of a slot that was freed since. Throws StaleSlot when there is none.
    void unpin(const SlotHandle& slot);

    // Where a live slot lies, from the beginning of the memory. Throws StaleSlot.
    std::uint64_t offset(const SlotHandle& slot) const;
    bool is_pinned(const SlotHandle& slot) const { return live(slot).pins != 0; }
    std::uint64_t slot_bytes(const SlotHandle& slot) const { return classes_[slabs_[live(slot).slab].class_number].slot_bytes; }

    std::uint64_t slab_bytes() const { return slab_bytes_; }
    std::uint64_t slab_count() const { return slabs_.size(); }
    std::uint64_t empty_slabs() const { return empty_.size(); }
    std::uint64_t used_bytes() const { return used_bytes_; }
    std::uint64_t quarantined_bytes() const { return quarantined_bytes_; }
    std::uint64_t relocated_bytes() const { return relocated_bytes_; }
    std::vector<ClassUsage> usage() const;

    // Throws std::logic_error when any two of the tables disagree; for tests.
    void check() const;

  private:
    static constexpr std::uint32_t none = UINT32_MAX;

    enum class State : std::uint8_t { free, live, quarantined };

    struct Slot {
        std::uint64_t generation = 0;
        std::uint64_t mark = 0;  // the last simulation that has seen it
        std::uint32_t slab = none;
        std::uint32_t place = 0;
        std::uint32_t pins = 0;
        State state = State::free;
    };

    struct Slab {
        std::uint64_t offset = 0;
        std::uint64_t size_bytes = 0;
        std::uint32_t class_number = none;
        std::uint32_t held = 0;   // live and quarantined slots
        std::uint32_t fixed = 0;  // those of them that are pinned
        std::vector<std::uint32_t> slot_of_place;
        std::vector<std::uint32_t> free_places;  // a stack
    };

    struct Class {
        std::uint64_t slot_bytes = 0;
        std::uint64_t free_places = 0;
        std::uint64_t live = 0;
        std::uint64_t quarantined = 0;
        std::uint64_t slabs = 0;
        SlabSet open;  // its slabs that have a free place
    };

    // How many slots of one size are asked for, and what of a plan serves them.
    struct Demand {
        std::uint64_t slot_bytes;
        std::uint64_t count = 0;
        std::uint64_t deficit = 0;  // beyond the free places of its class
        std::uint64_t slabs = 0;    // whole slabs that it gets
        bool gets_short = false;    // and the last, short one
    };

    // What would be done for a list of demands: empty these slabs, then give each demand its slabs.
    struct Plan {
        bool fits = false;
        std::vector<std::uint32_t> emptied;
    };

    // The counts that a plan is made from: as they are, or as they would be after freeing something.
    struct Counts {
        std::vector<std::uint32_t> held;         // by slab
        std::vector<std::uint64_t> free_places;  // by class
        std::uint64_t empty = 0;                 // whole slabs
        bool is_short_empty = false;
    };

    bool has_short_slab() const { return !slabs_.empty() && slabs_.back().size_bytes < slab_bytes_; }
    std::uint32_t class_of(std::uint64_t slot_bytes) const;

    static std::vector<Demand> demands(std::span<const std::uint64_t> sizes_bytes);
    Counts counts() const;
    void count_freed(Counts& after, std::span<const SlotHandle> freeing);
    Plan plan(std::vector<Demand>& demanded, const Counts& have) const;
    bool use_short_slab(std::vector<Demand>& demanded) const;

    void relocate_out_of(std::span<const std::uint32_t> emptied);
    void give_slabs(const std::vector<Demand>& demanded);
    void give_slab(std::uint32_t slab, std::uint32_t class_number);
    void take_slab(std::uint32_t slab) noexcept;
    std::uint32_t make_class(std::uint64_t slot_bytes);
    void return_unused_slabs() noexcept;

    SlotHandle take_slot(std::uint32_t class_number);
    void take_place(std::uint32_t class_number, std::uint32_t slot);
    void release_place(std::uint32_t slot);

    const Slot& live(const SlotHandle& slot) const;
    Slot& live(const SlotHandle& slot);

    std::byte* memory_;
    std::uint64_t slab_bytes_;
    std::vector<Slab> slabs_;
    SlabSet empty_;
    std::vector<Class> classes_;
    std::vector<std::uint32_t> unused_classes_;
    std::unordered_map<std::uint64_t, std::uint32_t> class_of_size_;
    std::vector<Slot> slots_;
    std::vector<std::uint32_t> unused_slots_;
    std::uint64_t simulations_ = 0;
    std::uint64_t used_bytes_ = 0;
    std::uint64_t quarantined_bytes_ = 0;
    std::uint64_t relocated_bytes_ = 0;
};

}  // namespace kvstore
