// What a reader must find at each node, and on which chunk boundaries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "records.h"
#include "types.h"

namespace kvstore::index {

// The units of one group that a worker reads, in every span.
struct GroupNeed {
    GroupNeed(std::uint8_t group_, bool is_state_, std::uint16_t spans_, std::vector<std::uint16_t> units_)
        : group(group_), is_state(is_state_), spans(spans_), units(std::move(units_)) {
        std::sort(units.begin(), units.end());
        if (!units.empty()) {
            range = {units.front(), static_cast<std::uint16_t>(units.back() + 1)};
        }
    }

    std::uint8_t group;
    bool is_state;
    std::uint16_t spans;
    std::vector<std::uint16_t> units;  // ascending
    Units range{0, 0};                 // from the first to the last
};

struct Needs {
    std::vector<GroupNeed> groups;  // ascending
    bool attention = false;
    bool states = false;
    bool accepts_lossy = false;
};

// Chunk boundaries that a reader insists on. Borrowed memory.
struct Grid {
    std::span<const std::uint32_t> boundaries;  // ascending
    const Digest* digests;                      // at 0, then at each boundary

    bool has(std::uint32_t boundary) const {
        return std::binary_search(boundaries.begin(), boundaries.end(), boundary);
    }
    // The digest at the smallest boundary at or past `end`: what a block ending there was computed with.
    const Digest* closing(std::uint32_t end) const {
        const auto found = std::lower_bound(boundaries.begin(), boundaries.end(), end);
        return found == boundaries.end() ? nullptr : digests + (found - boundaries.begin()) + 1;
    }
};

}  // namespace kvstore::index
