#include "slab_allocator.h"

#include <algorithm>
#include <cstring>

#include "slab_size.h"

namespace kvstore {
namespace {

[[noreturn]] void refuse_stale(const SlotHandle& slot, const std::string& found) {
    throw StaleSlot("slot " + std::to_string(slot.index) + " of generation " + std::to_string(slot.generation) +
                    " has been freed (" + found + "); match again");
}

constexpr std::uint64_t divide_up(std::uint64_t value, std::uint64_t by) { return (value + by - 1) / by; }

}  // namespace

SlabAllocator::SlabAllocator(std::byte* memory, std::uint64_t capacity_bytes, std::uint64_t slab_bytes)
    : memory_(memory),
      slab_bytes_(slab_bytes),
      empty_(slab_bytes == 0 ? 0 : static_cast<std::size_t>(divide_up(capacity_bytes, slab_bytes))) {
    const std::uint64_t usable = capacity_bytes / page_bytes * page_bytes;
    if (slab_bytes % page_bytes != 0 || (slab_bytes == 0) != (usable == 0)) {
        throw std::invalid_argument("slabs are positive multiples of " + std::to_string(page_bytes) + " bytes, got " +
                                    std::to_string(slab_bytes));
    }
    if (usable / page_bytes >= none) {
        throw std::invalid_argument("an arena has at most 2^32 pages, got " + std::to_string(capacity_bytes) +
                                    " bytes; open several stores");
    }
    for (std::uint64_t offset = 0; offset < usable; offset += slab_bytes) {
        empty_.insert(static_cast<std::uint32_t>(slabs_.size()));
        Slab& slab = slabs_.emplace_back();
        slab.offset = offset;
        slab.size_bytes = std::min(slab_bytes, usable - offset);
    }
}

// Planning

std::vector<SlabAllocator::Demand> SlabAllocator::demands(std::span<const std::uint64_t> sizes_bytes) {
    std::vector<Demand> demanded;
    std::size_t last = 0;
    for (const std::uint64_t size_bytes : sizes_bytes) {
        // Records of one prompt come in runs of few sizes.
        if (last >= demanded.size() || demanded[last].slot_bytes != size_bytes) {
            for (last = 0; last < demanded.size() && demanded[last].slot_bytes != size_bytes; ++last) {
            }
            if (last == demanded.size()) {
                demanded.push_back({size_bytes});
            }
        }
        ++demanded[last].count;
    }
    return demanded;
}

std::uint32_t SlabAllocator::class_of(std::uint64_t slot_bytes) const {
    const auto found = class_of_size_.find(slot_bytes);
    return found == class_of_size_.end() ? none : found->second;
}

SlabAllocator::Counts SlabAllocator::counts() const {
    Counts now;
    now.held.reserve(slabs_.size());
    for (const Slab& slab : slabs_) {
        now.held.push_back(slab.held);
    }
    for (const Class& each : classes_) {
        now.free_places.push_back(each.free_places);
    }
    now.is_short_empty = has_short_slab() && slabs_.back().held == 0;
    now.empty = empty_.size() - static_cast<std::uint64_t>(now.is_short_empty);
    return now;
}

void SlabAllocator::count_freed(Counts& after, std::span<const SlotHandle> freeing) {
    ++simulations_;
    for (const SlotHandle& handle : freeing) {
        Slot& slot = live(handle);
        if (slot.mark == simulations_) {
            refuse_stale(handle, "it is named twice");
        }
        slot.mark = simulations_;
        if (slot.pins != 0) {
            continue;
        }
        const Slab& slab = slabs_[slot.slab];
        ++after.free_places[slab.class_number];
        if (--after.held[slot.slab] == 0) {
            after.free_places[slab.class_number] -= slab.slot_of_place.size();
            if (slab.size_bytes < slab_bytes_) {
                after.is_short_empty = true;
            } else {
                ++after.empty;
            }
        }
    }
}

bool SlabAllocator::use_short_slab(std::vector<Demand>& demanded) const {
    for (Demand& demand : demanded) {
        const std::uint64_t in_short = slabs_.back().size_bytes / demand.slot_bytes;
        const std::uint64_t in_slab = slab_bytes_ / demand.slot_bytes;
        const std::uint64_t rest = demand.deficit - std::min(demand.deficit, in_short);
        if (divide_up(rest, in_slab) < demand.slabs) {
            --demand.slabs;
            demand.gets_short = true;
            return true;
        }
    }
    return false;
}

SlabAllocator::Plan SlabAllocator::plan(std::vector<Demand>& demanded, const Counts& have) const {
    Plan result;
    std::vector<std::uint64_t> spare = have.free_places;
    std::uint64_t wanted = 0;
    for (Demand& demand : demanded) {
        if (demand.slot_bytes > slab_bytes_) {
            return result;
        }
        const std::uint32_t number = class_of(demand.slot_bytes);
        const std::uint64_t there = number == none ? 0 : have.free_places[number];
        demand.deficit = demand.count - std::min(demand.count, there);
        demand.slabs = divide_up(demand.deficit, slab_bytes_ / demand.slot_bytes);
        wanted += demand.slabs;
        if (number != none) {
            spare[number] = there - std::min(there, demand.count);
        }
    }
    if (have.is_short_empty && use_short_slab(demanded)) {
        --wanted;
    }
    std::uint64_t lacking = wanted - std::min(wanted, have.empty);
    if (lacking == 0) {
        result.fits = true;
        return result;
    }
    // A slab can be emptied when none of its slots is pinned. It takes all its places out of its class, so that many
    // must be spare there: as many as it has free, plus one for each slot that moves.
    const auto can_be_emptied = [&](std::uint32_t number) {
        const Slab& slab = slabs_[number];
        return have.held[number] != 0 && slab.fixed == 0 && spare[slab.class_number] >= slab.slot_of_place.size();
    };
    std::vector<std::uint32_t> candidates;
    for (std::uint32_t number = 0; number < slabs_.size(); ++number) {
        if (slabs_[number].size_bytes == slab_bytes_ && can_be_emptied(number)) {
            candidates.push_back(number);
        }
    }
    const auto moved_bytes = [&](std::uint32_t number) {
        return have.held[number] * classes_[slabs_[number].class_number].slot_bytes;
    };
    std::sort(candidates.begin(), candidates.end(), [&](std::uint32_t left, std::uint32_t right) {
        const std::uint64_t left_bytes = moved_bytes(left);
        const std::uint64_t right_bytes = moved_bytes(right);
        return left_bytes != right_bytes ? left_bytes < right_bytes : left < right;
    });
    for (const std::uint32_t number : candidates) {
        if (lacking != 0 && can_be_emptied(number)) {
            spare[slabs_[number].class_number] -= slabs_[number].slot_of_place.size();
            result.emptied.push_back(number);
            --lacking;
        }
    }
    const auto last = static_cast<std::uint32_t>(slabs_.size() - 1);
    if (lacking == 1 && has_short_slab() && !have.is_short_empty && can_be_emptied(last) && use_short_slab(demanded)) {
        result.emptied.push_back(last);
        --lacking;
    }
    result.fits = lacking == 0;
    return result;
}

bool SlabAllocator::would_fit(std::span<const std::uint64_t> sizes_bytes, std::span<const SlotHandle> freeing) {
    std::vector<Demand> demanded = demands(sizes_bytes);
    Counts after = counts();
    count_freed(after, freeing);
    return plan(demanded, after).fits;
}

bool SlabAllocator::fits_when_empty(std::span<const std::uint64_t> sizes_bytes) const {
    std::vector<Demand> demanded = demands(sizes_bytes);
    Counts nothing;
    nothing.held.resize(slabs_.size());
    nothing.free_places.resize(classes_.size());
    nothing.is_short_empty = has_short_slab();
    nothing.empty = slabs_.size() - static_cast<std::uint64_t>(nothing.is_short_empty);
    return plan(demanded, nothing).fits;
}

// Allocating

bool SlabAllocator::allocate(std::span<const std::uint64_t> sizes_bytes, std::vector<SlotHandle>& slots,
                             bool may_move) {
    std::vector<Demand> demanded = demands(sizes_bytes);
    const bool is_there = std::all_of(demanded.begin(), demanded.end(), [&](const Demand& demand) {
        const std::uint32_t number = class_of(demand.slot_bytes);
        return number != none && classes_[number].free_places >= demand.count;
    });
    Plan planned;
    if (!is_there) {
        planned = plan(demanded, counts());
        if (!planned.fits || (!may_move && !planned.emptied.empty())) {
            return false;
        }
    }
    // Whatever needs memory of the process comes first: after it nothing fails half done.
    slots.reserve(slots.size() + sizes_bytes.size());
    if (unused_slots_.size() < sizes_bytes.size()) {
        const std::size_t known = slots_.size();
        const std::size_t grown = known + std::max(known / 2, sizes_bytes.size());
        unused_slots_.reserve(grown);
        slots_.resize(grown);
        for (std::size_t index = grown; index-- > known;) {
            unused_slots_.push_back(static_cast<std::uint32_t>(index));
        }
    }
    if (!is_there) {
        relocate_out_of(planned.emptied);
        try {
            give_slabs(demanded);
        } catch (...) {
            return_unused_slabs();
            throw;
        }
    }
    std::uint32_t number = none;
    for (const std::uint64_t size_bytes : sizes_bytes) {
        if (number == none || classes_[number].slot_bytes != size_bytes) {
            number = class_of(size_bytes);
        }
        slots.push_back(take_slot(number));
    }
    return true;
}

void SlabAllocator::relocate_out_of(std::span<const std::uint32_t> emptied) {
    for (const std::uint32_t number : emptied) {
        Class& own = classes_[slabs_[number].class_number];
        own.open.erase(number);
        own.free_places -= slabs_[number].free_places.size();
    }
    for (const std::uint32_t number : emptied) {
        Slab& slab = slabs_[number];
        const std::uint64_t slot_bytes = classes_[slab.class_number].slot_bytes;
        for (std::size_t place = 0; place < slab.slot_of_place.size(); ++place) {
            const std::uint32_t index = slab.slot_of_place[place];
            if (index == none) {
                continue;
            }
            const std::byte* source = memory_ + slab.offset + place * slot_bytes;
            take_place(slab.class_number, index);
            const Slot& slot = slots_[index];
            std::memcpy(memory_ + slabs_[slot.slab].offset + slot.place * slot_bytes, source, slot_bytes);
            relocated_bytes_ += slot_bytes;
        }
        slab.held = 0;
        take_slab(number);
    }
}

void SlabAllocator::give_slabs(const std::vector<Demand>& demanded) {
    for (const Demand& demand : demanded) {
        if (demand.slabs == 0 && !demand.gets_short) {
            continue;
        }
        const std::uint32_t number = make_class(demand.slot_bytes);
        if (demand.gets_short) {
            give_slab(static_cast<std::uint32_t>(slabs_.size() - 1), number);
        }
        for (std::uint64_t given = 0; given < demand.slabs; ++given) {
            give_slab(empty_.first(), number);
        }
    }
}

std::uint32_t SlabAllocator::make_class(std::uint64_t slot_bytes) {
    const std::uint32_t known = class_of(slot_bytes);
    if (known != none) {
        return known;
    }
    if (unused_classes_.empty()) {
        unused_classes_.reserve(classes_.size() + 1);
        classes_.push_back({0, 0, 0, 0, 0, SlabSet(slabs_.size())});
        unused_classes_.push_back(static_cast<std::uint32_t>(classes_.size() - 1));
    }
    const std::uint32_t number = unused_classes_.back();
    class_of_size_.emplace(slot_bytes, number);
    unused_classes_.pop_back();
    classes_[number].slot_bytes = slot_bytes;
    return number;
}

void SlabAllocator::give_slab(std::uint32_t number, std::uint32_t class_number) {
    Slab& slab = slabs_[number];
    Class& own = classes_[class_number];
    const auto count = static_cast<std::uint32_t>(slab.size_bytes / own.slot_bytes);
    slab.free_places.reserve(count);
    slab.slot_of_place.assign(count, none);
    for (std::uint32_t place = count; place-- > 0;) {
        slab.free_places.push_back(place);
    }
    slab.class_number = class_number;
    own.free_places += count;
    ++own.slabs;
    own.open.insert(number);
    empty_.erase(number);
}

// A slab that holds nothing, and is in no count of free places, goes back to the pool.
void SlabAllocator::take_slab(std::uint32_t number) noexcept {
    Slab& slab = slabs_[number];
    Class& own = classes_[slab.class_number];
    own.open.erase(number);
    if (--own.slabs == 0) {
        class_of_size_.erase(own.slot_bytes);
        unused_classes_.push_back(slab.class_number);  // reserved by make_class
    }
    slab.class_number = none;
    slab.slot_of_place.clear();
    slab.free_places.clear();
    empty_.insert(number);
}

void SlabAllocator::return_unused_slabs() noexcept {
    for (std::uint32_t number = 0; number < slabs_.size(); ++number) {
        const Slab& slab = slabs_[number];
        if (slab.class_number != none && slab.held == 0) {
            classes_[slab.class_number].free_places -= slab.free_places.size();
            take_slab(number);
        }
    }
}

SlotHandle SlabAllocator::take_slot(std::uint32_t class_number) {
    const std::uint32_t index = unused_slots_.back();
    unused_slots_.pop_back();
    Class& own = classes_[class_number];
    take_place(class_number, index);
    Slot& slot = slots_[index];
    slot.state = State::live;
    ++own.live;
    used_bytes_ += own.slot_bytes;
    return {index, slot.generation, own.slot_bytes};
}

void SlabAllocator::take_place(std::uint32_t class_number, std::uint32_t slot) {
    Class& own = classes_[class_number];
    const std::uint32_t number = own.open.first();
    Slab& slab = slabs_[number];
    const std::uint32_t place = slab.free_places.back();
    slab.free_places.pop_back();
    slab.slot_of_place[place] = slot;
    ++slab.held;
    --own.free_places;
    if (slab.free_places.empty()) {
        own.open.erase(number);
    }
    slots_[slot].slab = number;
    slots_[slot].place = place;
}

// Freeing and pinning

const SlabAllocator::Slot& SlabAllocator::live(const SlotHandle& slot) const {
    if (slot.index >= slots_.size()) {
        refuse_stale(slot, "there is no such slot");
    }
    const Slot& found = slots_[slot.index];
    if (found.state != State::live || found.generation != slot.generation) {
        refuse_stale(slot, "it is at generation " + std::to_string(found.generation));
    }
    return found;
}

SlabAllocator::Slot& SlabAllocator::live(const SlotHandle& slot) {
    return const_cast<Slot&>(static_cast<const SlabAllocator*>(this)->live(slot));
}

void SlabAllocator::free(const SlotHandle& handle) {
    Slot& slot = live(handle);
    Class& own = classes_[slabs_[slot.slab].class_number];
    ++slot.generation;
    --own.live;
    if (slot.pins != 0) {
        slot.state = State::quarantined;
        ++own.quarantined;
        quarantined_bytes_ += own.slot_bytes;
    } else {
        release_place(static_cast<std::uint32_t>(handle.index));
    }
}

void SlabAllocator::release_place(std::uint32_t index) {
    Slot& slot = slots_[index];
    Slab& slab = slabs_[slot.slab];
    Class& own = classes_[slab.class_number];
    used_bytes_ -= own.slot_bytes;
    slab.slot_of_place[slot.place] = none;
    slab.free_places.push_back(slot.place);
    ++own.free_places;
    own.open.insert(slot.slab);
    if (--slab.held == 0) {
        own.free_places -= slab.free_places.size();
        take_slab(slot.slab);
    }
    slot.state = State::free;
    slot.slab = none;
    unused_slots_.push_back(index);
}

void SlabAllocator::pin(const SlotHandle& handle) {
    Slot& slot = live(handle);
    if (slot.pins == UINT32_MAX) {
        throw std::overflow_error("slot " + std::to_string(handle.index) + " has 2^32 - 1 pins, which is the limit");
    }
    if (slot.pins++ == 0) {
        ++slabs_[slot.slab].fixed;
    }
}

void SlabAllocator::unpin(const SlotHandle& handle) {
    if (handle.index >= slots_.size()) {
        refuse_stale(handle, "there is no such slot");
    }
    Slot& slot = slots_[handle.index];
    const bool is_freed = slot.state == State::quarantined && slot.generation == handle.generation + 1;
    if (slot.pins == 0 || !(is_freed || (slot.state == State::live && slot.generation == handle.generation))) {
        throw StaleSlot("slot " + std::to_string(handle.index) + " of generation " +
                        std::to_string(handle.generation) + " is not pinned");
    }
    if (--slot.pins != 0) {
        return;
    }
    --slabs_[slot.slab].fixed;
    if (is_freed) {
        Class& own = classes_[slabs_[slot.slab].class_number];
        --own.quarantined;
        quarantined_bytes_ -= own.slot_bytes;
        release_place(static_cast<std::uint32_t>(handle.index));
    }
}

std::uint64_t SlabAllocator::offset(const SlotHandle& handle) const {
    const Slot& slot = live(handle);
    const Slab& slab = slabs_[slot.slab];
    return slab.offset + slot.place * classes_[slab.class_number].slot_bytes;
}

// Looking

std::vector<ClassUsage> SlabAllocator::usage() const {
    std::vector<ClassUsage> result;
    for (const Class& each : classes_) {
        if (each.slabs != 0) {
            result.push_back({each.slot_bytes, each.slabs, each.live, each.quarantined, each.free_places});
        }
    }
    std::sort(result.begin(), result.end(),
              [](const ClassUsage& left, const ClassUsage& right) { return left.slot_bytes < right.slot_bytes; });
    return result;
}

void SlabAllocator::check() const {
    const auto require = [](bool holds, const char* what) {
        if (!holds) {
            throw std::logic_error(std::string("arena: ") + what);
        }
    };
    std::vector<std::uint64_t> free_places(classes_.size());
    std::vector<std::uint64_t> owned(classes_.size());
    std::uint64_t used = 0;
    std::uint64_t quarantined = 0;
    std::uint64_t end = 0;
    for (std::uint32_t number = 0; number < slabs_.size(); ++number) {
        const Slab& slab = slabs_[number];
        require(slab.offset == end, "slabs do not lie end to end");
        end += slab.size_bytes;
        require(empty_.contains(number) == (slab.class_number == none), "an empty slab has a class");
        require((slab.held == 0) == (slab.class_number == none), "a slab of a class holds nothing");
        if (slab.class_number == none) {
            continue;
        }
        const Class& own = classes_[slab.class_number];
        require(slab.slot_of_place.size() == slab.size_bytes / own.slot_bytes, "a slab has the wrong places");
        require(own.open.contains(number) == !slab.free_places.empty(), "open slabs are not those with a free place");
        require(slab.held + slab.free_places.size() == slab.slot_of_place.size(), "places are neither held nor free");
        std::uint32_t fixed = 0;
        for (std::uint32_t place = 0; place < slab.slot_of_place.size(); ++place) {
            const std::uint32_t index = slab.slot_of_place[place];
            if (index == none) {
                continue;
            }
            const Slot& slot = slots_[index];
            require(slot.slab == number && slot.place == place, "a slot is not where its slab has it");
            require(slot.state != State::free, "a free slot has a place");
            fixed += static_cast<std::uint32_t>(slot.pins != 0);
            used += own.slot_bytes;
            quarantined += slot.state == State::quarantined ? own.slot_bytes : 0;
        }
        require(fixed == slab.fixed, "pinned slots are miscounted");
        free_places[slab.class_number] += slab.free_places.size();
        ++owned[slab.class_number];
    }
    for (std::size_t number = 0; number < classes_.size(); ++number) {
        require(free_places[number] == classes_[number].free_places, "free places are miscounted");
        require(owned[number] == classes_[number].slabs, "slabs are miscounted");
    }
    require(used == used_bytes_ && quarantined == quarantined_bytes_, "bytes are miscounted");
}

}  // namespace kvstore
