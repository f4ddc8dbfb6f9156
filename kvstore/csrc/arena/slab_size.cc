#include "slab_size.h"

#include <algorithm>
#include <vector>

namespace kvstore {
namespace {

// Classes weighed, so that the search is bounded whatever the caller names.
constexpr std::size_t classes_weighed_max = 64;

}  // namespace

std::uint64_t choose_slab_bytes(std::uint64_t capacity_bytes, std::uint64_t largest_slot_bytes,
                                std::span<const std::uint64_t> slot_sizes_bytes) {
    const std::uint64_t usable = capacity_bytes / page_bytes * page_bytes;
    const std::uint64_t largest = std::max(page_bytes, (largest_slot_bytes + page_bytes - 1) / page_bytes * page_bytes);
    if (largest >= usable) {
        return usable;
    }
    std::vector<std::uint64_t> classes(slot_sizes_bytes.begin(), slot_sizes_bytes.end());
    classes.push_back(largest);
    std::sort(classes.begin(), classes.end());
    classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
    std::erase_if(classes, [&](std::uint64_t size) { return size == 0 || size > largest; });
    if (classes.size() > classes_weighed_max) {
        classes.erase(classes.begin(), classes.end() - classes_weighed_max);
    }
    // A share of the capacity for each class, and one for sizes not known in advance (the shares of shards).
    const double shares = static_cast<double>(classes.size()) + 1;
    const double share_bytes = static_cast<double>(usable) / shares;
    const auto waste_bytes = [&](std::uint64_t slab) {
        const auto slab_bytes = static_cast<double>(slab);
        double fraction = static_cast<double>(largest) / (4 * slab_bytes);
        for (const std::uint64_t size : classes) {
            fraction += static_cast<double>(slab % size) / slab_bytes;
        }
        const std::uint64_t rest = usable % slab;
        const std::uint64_t unusable = rest < classes.front() ? rest : 0;
        return share_bytes * fraction + shares * slab_bytes / 2 + static_cast<double>(unusable);
    };
    const std::uint64_t last = std::max(largest, std::min(usable, slab_bytes_preferred_max));
    std::uint64_t best = largest;
    double best_waste = waste_bytes(largest);
    for (std::uint64_t slab = largest + page_bytes; slab <= last; slab += page_bytes) {
        const double waste = waste_bytes(slab);
        if (waste < best_waste) {
            best = slab;
            best_waste = waste;
        }
    }
    return best;
}

}  // namespace kvstore
