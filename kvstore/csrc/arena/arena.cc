#include "arena.h"

#include <cstring>
#include <string>
#include <utility>

#include "process_file.h"
#include "slab_size.h"

namespace kvstore {
namespace {

void check_sizes(std::span<const std::uint64_t> sizes_bytes) {
    for (const std::uint64_t size_bytes : sizes_bytes) {
        if (size_bytes == 0 || size_bytes % page_bytes != 0) {
            throw std::invalid_argument("slot sizes are positive multiples of " + std::to_string(page_bytes) +
                                        ", got " + std::to_string(size_bytes));
        }
    }
}

}  // namespace

Arena::Arena(std::shared_ptr<SharedMemory> memory, std::uint64_t capacity_bytes, std::uint64_t slab_bytes)
    : made_at_fork_(fork_count()), slab_bytes_(slab_bytes), memory_(std::move(memory)) {
    slots_.emplace(memory_->data() + arena_header_bytes, capacity_bytes, slab_bytes);
}

void Arena::check_not_inherited() const {
    if (fork_count() != made_at_fork_) {
        throw ArenaClosed("this arena belongs to the process that forked this one; open a store of your own");
    }
}

SlabAllocator& Arena::slots_of_open() {
    if (!slots_) {
        throw ArenaClosed("the arena is closed; open the store again");
    }
    return *slots_;
}

SlabAllocator& Arena::slots_for(const SlotHandle& slot) {
    if (!slots_) {
        throw StaleSlot("slot " + std::to_string(slot.index) + " of generation " + std::to_string(slot.generation) +
                        " has gone with its arena, which is closed; open the store again");
    }
    return *slots_;
}

bool Arena::allocate(std::span<const std::uint64_t> sizes_bytes, std::vector<SlotHandle>& slots, bool may_move) {
    check_sizes(sizes_bytes);
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    return slots_of_open().allocate(sizes_bytes, slots, may_move);
}

bool Arena::would_fit(std::span<const std::uint64_t> sizes_bytes, std::span<const SlotHandle> freeing) {
    check_sizes(sizes_bytes);
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    return slots_of_open().would_fit(sizes_bytes, freeing);
}

bool Arena::fits_when_empty(std::span<const std::uint64_t> sizes_bytes) {
    check_sizes(sizes_bytes);
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    return slots_of_open().fits_when_empty(sizes_bytes);
}

void Arena::free(std::span<const SlotHandle> slots) {
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    for (const SlotHandle& slot : slots) {
        slots_for(slot).free(slot);
    }
}

void Arena::pin(std::span<const SlotHandle> slots) {
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    std::size_t pinned = 0;
    try {
        for (; pinned < slots.size(); ++pinned) {
            slots_for(slots[pinned]).pin(slots[pinned]);
        }
    } catch (...) {
        while (pinned-- > 0) {
            slots_->unpin(slots[pinned]);
        }
        throw;
    }
}

void Arena::unpin(std::span<const SlotHandle> slots) {
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    for (const SlotHandle& slot : slots) {
        slots_for(slot).unpin(slot);
    }
}

std::uint64_t Arena::location(const SlotHandle& slot, bool must_be_pinned) {
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    const SlabAllocator& slots = slots_for(slot);
    const std::uint64_t offset = slots.offset(slot);
    if (must_be_pinned && !slots.is_pinned(slot)) {
        throw StaleSlot("slot " + std::to_string(slot.index) + " is not pinned, so it has no place to rely on; pin it");
    }
    return arena_header_bytes + offset;
}

std::vector<std::uint64_t> Arena::locations(std::span<const SlotHandle> slots) {
    check_not_inherited();
    std::vector<std::uint64_t> result;
    result.reserve(slots.size());
    const std::lock_guard locked(mutex_);
    for (const SlotHandle& slot : slots) {
        const SlabAllocator& own = slots_for(slot);
        if (!own.is_pinned(slot)) {
            throw StaleSlot("slot " + std::to_string(slot.index) +
                            " is not pinned, so it has no place to rely on; pin it");
        }
        result.push_back(arena_header_bytes + own.offset(slot));
    }
    return result;
}

std::byte* Arena::begin_copy(const SlotHandle& slot, std::uint64_t size_bytes, std::int64_t offset,
                             std::shared_ptr<SharedMemory>& keep) {
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    SlabAllocator& slots = slots_for(slot);
    const std::uint64_t slot_bytes = slots.slot_bytes(slot);
    const auto begin = static_cast<std::uint64_t>(offset);
    if (offset < 0 || begin > slot_bytes || size_bytes > slot_bytes - begin) {
        throw std::invalid_argument(std::to_string(size_bytes) + " bytes at " + std::to_string(offset) +
                                    " lie outside a slot of " + std::to_string(slot_bytes) + " bytes");
    }
    slots.pin(slot);
    keep = memory_;
    return keep->data() + arena_header_bytes + slots.offset(slot) + begin;
}

void Arena::end_copy(const SlotHandle& slot) {
    check_not_inherited();
    const std::lock_guard locked(mutex_);
    if (slots_) {
        slots_->unpin(slot);
    }
}

void Arena::write(const SlotHandle& slot, const std::byte* source, std::uint64_t size_bytes, std::int64_t offset) {
    std::shared_ptr<SharedMemory> keep;
    std::byte* target = begin_copy(slot, size_bytes, offset, keep);
    if (size_bytes != 0) {
        std::memcpy(target, source, size_bytes);
    }
    end_copy(slot);
}

void Arena::read(const SlotHandle& slot, std::byte* into, std::uint64_t size_bytes, std::int64_t offset) {
    std::shared_ptr<SharedMemory> keep;
    const std::byte* source = begin_copy(slot, size_bytes, offset, keep);
    if (size_bytes != 0) {
        std::memcpy(into, source, size_bytes);
    }
    end_copy(slot);
}

ArenaUsage Arena::usage(bool with_classes) {
    if (fork_count() != made_at_fork_) {
        return {};
    }
    const std::lock_guard locked(mutex_);
    if (!slots_) {
        return {};
    }
    return {slots_->used_bytes(), slots_->quarantined_bytes(), slots_->relocated_bytes(),
            slots_->slab_count(), slots_->empty_slabs(),       with_classes ? slots_->usage() : std::vector<ClassUsage>{}};
}

std::shared_ptr<SharedMemory> Arena::memory() {
    if (fork_count() != made_at_fork_) {
        return nullptr;
    }
    const std::lock_guard locked(mutex_);
    return memory_;
}

bool Arena::is_closed() { return memory() == nullptr; }

void Arena::close() {
    if (fork_count() != made_at_fork_) {
        return;
    }
    std::shared_ptr<SharedMemory> last;
    const std::lock_guard locked(mutex_);
    if (memory_) {
        memory_->release();
    }
    last = std::move(memory_);
    memory_.reset();
    slots_.reset();
}

void Arena::check() {
    const std::lock_guard locked(mutex_);
    slots_of_open().check();
}

}  // namespace kvstore
