// The arena: slots in shared memory. Any thread may call any method; none takes a lock but the arena's own mutex.
//
// A call holds the mutex for microseconds, but for `allocate` with `may_move`, which copies up to the live bytes of each
// slab that it empties: slabs hold at most 32 MiB unless one slot is larger.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "shared_memory.h"
#include "slab_allocator.h"

namespace kvstore {

// The arena was closed, or belongs to the process that forked this one.
class ArenaClosed : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct ArenaUsage {
    std::uint64_t used_bytes = 0;
    std::uint64_t quarantined_bytes = 0;
    std::uint64_t relocated_bytes = 0;
    std::uint64_t slabs = 0;
    std::uint64_t empty_slabs = 0;
    std::vector<ClassUsage> classes;
};

class Arena {
  public:
    // Slabs of `slab_bytes` in `memory`, behind its header. REQUIRES: they fit, and memory is not null.
    Arena(std::shared_ptr<SharedMemory> memory, std::uint64_t capacity_bytes, std::uint64_t slab_bytes);

    // As in SlabAllocator. All throw ArenaClosed once the arena is closed, but those that name slots: these are stale.
    bool allocate(std::span<const std::uint64_t> sizes_bytes, std::vector<SlotHandle>& slots, bool may_move);
    bool would_fit(std::span<const std::uint64_t> sizes_bytes, std::span<const SlotHandle> freeing);
    bool fits_when_empty(std::span<const std::uint64_t> sizes_bytes);

    // Frees in order; throws StaleSlot at the first that is not live, with those before it freed.
    void free(std::span<const SlotHandle> slots);
    // All or none. Throws StaleSlot.
    void pin(std::span<const SlotHandle> slots);
    // In order; throws StaleSlot at the first that is not pinned, with those before it unpinned.
    void unpin(std::span<const SlotHandle> slots);

    // Offset of a live slot in the mapping; with `must_be_pinned`, of one that stays there. Throws StaleSlot.
    std::uint64_t location(const SlotHandle& slot, bool must_be_pinned);
    std::vector<std::uint64_t> locations(std::span<const SlotHandle> slots);

    // Copies bytes in or out of a slot, outside of the mutex: the slot is pinned meanwhile.
    // Throws StaleSlot, and std::invalid_argument when the range lies outside the slot.
    void write(const SlotHandle& slot, const std::byte* source, std::uint64_t size_bytes, std::int64_t offset);
    void read(const SlotHandle& slot, std::byte* into, std::uint64_t size_bytes, std::int64_t offset);

    ArenaUsage usage(bool with_classes);
    std::uint64_t slab_bytes() const { return slab_bytes_; }

    // Null once the arena is closed.
    std::shared_ptr<SharedMemory> memory();
    bool is_closed();
    // Gives up name and descriptor; every slot is stale. The mapping stays for those who hold `memory`. Idempotent.
    void close();
    void check();

  private:
    SlabAllocator& slots_of_open();
    SlabAllocator& slots_for(const SlotHandle& slot);
    // The address of a range of a slot, which is pinned.
    std::byte* begin_copy(const SlotHandle& slot, std::uint64_t size_bytes, std::int64_t offset,
                          std::shared_ptr<SharedMemory>& keep);
    void end_copy(const SlotHandle& slot);
    // Throws in a forked child, where the mutex may be locked for ever.
    void check_not_inherited() const;

    const std::uint64_t made_at_fork_;
    const std::uint64_t slab_bytes_;
    std::mutex mutex_;
    std::shared_ptr<SharedMemory> memory_;
    std::optional<SlabAllocator> slots_;
};

}  // namespace kvstore
