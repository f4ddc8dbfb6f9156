// How an arena is divided: one slab size, chosen at open.
#pragma once

#include <cstdint>
#include <span>

namespace kvstore {

inline constexpr std::uint64_t page_bytes = 4096;

// Relocating empties one slab at a time under the arena's mutex; slabs are no larger than this unless one slot is.
inline constexpr std::uint64_t slab_bytes_preferred_max = std::uint64_t{32} << 20;

// The slab size that is expected to waste least: what does not divide into slots of `slot_sizes_bytes` (those known;
// others may come), and half a slab per class for the one that is filling.
// Pages, at least `largest_slot_bytes` rounded up, and at most the capacity rounded down.
std::uint64_t choose_slab_bytes(std::uint64_t capacity_bytes, std::uint64_t largest_slot_bytes,
                                std::span<const std::uint64_t> slot_sizes_bytes);

}  // namespace kvstore
