#include "counted.h"

#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace kvstore::index {
namespace {

constexpr Units one_unit{0, 1};

// How much of the path's attention is there, in blocks.
std::uint32_t present_blocks(const Index& index, const CountedWrite& write) {
    const std::uint32_t end_tokens = write.path.blocks * write.path.block_tokens;
    const Found found = index.match({write.path, {}, end_tokens, write.needs, nullptr, 0, {}});
    return found.attention_tokens / write.path.block_tokens;
}

std::vector<Name> names_of(const Index& index, const CountedWrite& write) {
    std::vector<Name> names;
    for (const GroupNeed& need : write.needs->groups) {
        if (need.is_state) {
            for (const CountedState& state : write.states) {
                names.push_back({state.blocks - 1, need.group, 0, one_unit, {}});
            }
        } else {
            for (std::uint32_t node = present_blocks(index, write); node < write.path.blocks; ++node) {
                names.push_back({node, need.group, 0, one_unit, {}});
            }
        }
    }
    return names;
}

// Give what is missing its size; all of their bytes. Both lists of states are in the same order.
std::uint64_t size_rows(std::vector<Row>& missing, const CountedWrite& write) {
    std::uint64_t bytes = 0;
    auto state = write.states.begin();
    for (const GroupNeed& need : write.needs->groups) {
        for (Row& row : missing) {
            if (row.group != need.group) {
                continue;
            }
            row.slot.size_bytes = write.block_bytes;
            if (need.is_state) {
                while (state->blocks != row.node + 1) {
                    ++state;
                }
                row.slot.size_bytes = state->size_bytes;
            }
            bytes += row.slot.size_bytes;
        }
    }
    return bytes;
}

std::uint64_t bytes_of(const std::vector<Slot>& slots) {
    return std::accumulate(slots.begin(), slots.end(), std::uint64_t{0},
                           [](std::uint64_t bytes, const Slot& slot) { return bytes + slot.size_bytes; });
}

// Evict until so much fits. False, and nothing has gone, if it never does.
bool make_room(Index& index, std::uint64_t needed_bytes, double capacity_bytes, std::uint64_t& evicted_bytes) {
    const double lacking_bytes = static_cast<double>(index.committed_bytes() + needed_bytes) - capacity_bytes;
    if (!(lacking_bytes > 0)) {
        return true;
    }
    const auto whole_bytes = static_cast<std::uint64_t>(std::ceil(lacking_bytes));
    std::uint64_t freed_bytes = 0;
    for (std::uint64_t target_bytes = whole_bytes; freed_bytes < whole_bytes;) {
        const std::uint64_t chosen_bytes = index.choose(target_bytes);
        // What is chosen counts with its memory in the index, which is not counted here.
        freed_bytes = bytes_of(index.chosen_slots(index.chosen_count()));
        if (freed_bytes < whole_bytes && chosen_bytes < target_bytes) {
            index.drop_choice();
            return false;
        }
        target_bytes = chosen_bytes + whole_bytes - freed_bytes;
    }
    index.evict_chosen();
    evicted_bytes = freed_bytes;
    return true;
}

}  // namespace

Counted write_counted(Index& index, const CountedWrite& write) {
    Counted counted;
    const std::vector<Name> names = names_of(index, write);
    if (names.empty()) {
        return counted;
    }
    WriteSet set = index.plan(write.path, names, false);
    if (set.status != PlanStatus::ok) {
        counted.outcome = CountedOutcome::wrong_path;
        return counted;
    }
    if (set.missing.empty()) {
        return counted;
    }
    if (index.record_count() + set.missing.size() > write.records_max) {
        counted.outcome = CountedOutcome::too_many;
        return counted;
    }
    const std::uint64_t needed_bytes = size_rows(set.missing, write);
    if (static_cast<double>(needed_bytes) > write.capacity_bytes) {
        counted.outcome = CountedOutcome::no_room;
        return counted;
    }
    std::vector<std::uint64_t> ready(set.missing.size());
    std::iota(ready.begin(), ready.end(), std::uint64_t{0});
    const std::vector<std::uint64_t> costs_us(ready.size());
    index.enter(set, write.path, write.salt, {}, {});
    try {
        if (!make_room(index, needed_bytes, write.capacity_bytes, counted.evicted_bytes)) {
            index.undo(set);
            counted.outcome = CountedOutcome::no_room;
            return counted;
        }
        index.commit(set, ready, costs_us, {});
    } catch (...) {
        index.drop_choice();
        index.undo(set);
        throw;
    }
    index.leave(set);
    index.let_go(set);
    counted.written_bytes = needed_bytes;
    return counted;
}

}  // namespace kvstore::index
