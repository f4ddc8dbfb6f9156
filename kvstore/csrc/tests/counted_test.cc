// Counted writes beside an index that is led through each of their steps by hand, and when memory runs out. Random,
// from fixed seeds.
#include "../index/counted.h"

#include <algorithm>
#include <random>
#include <tuple>

#include "check.h"
#include "failing_memory.h"

using namespace kvstore::index;
using kvstore::testing::allocations_left;
using kvstore::testing::check;

namespace {

constexpr std::uint32_t block_tokens = 4;
constexpr std::uint32_t block_bytes = 100;
constexpr std::uint64_t records_max = 1U << 20;

using Random = std::mt19937_64;

std::uint32_t draw(Random& random, std::uint32_t below) { return static_cast<std::uint32_t>(random() % below); }

Digest digest_of(std::uint64_t first, std::uint64_t second) {
    Digest result{};
    std::memcpy(result.bytes.data(), &first, sizeof first);
    std::memcpy(result.bytes.data() + sizeof first, &second, sizeof second);
    return result;
}

// A text of some blocks, whose first ones it shares with other texts.
struct Text {
    explicit Text(Random& random) {
        const std::uint32_t blocks = 1 + draw(random, 12);
        std::uint64_t prefix = 1;
        for (std::uint32_t block = 0; block < blocks; ++block) {
            prefix = 3 * prefix + draw(random, block < 4 ? 2 : 3);
            keys.push_back(digest_of(2, prefix));
            if (draw(random, 3) == 0) {
                states.push_back({block + 1, 50 + 10 * draw(random, 40)});
            }
        }
    }
    Path path() const {
        return {digest_of(1, 0), block_tokens, keys.data(), static_cast<std::uint32_t>(keys.size()), nullptr, {}};
    }
    std::vector<Digest> keys;
    std::vector<CountedState> states;
};

Needs needs_of(bool attention, bool states) {
    Needs needs;
    if (attention) {
        needs.groups.emplace_back(std::uint8_t{0}, false, std::uint16_t{1}, std::vector<std::uint16_t>{0});
    }
    if (states) {
        const auto group = static_cast<std::uint8_t>(needs.groups.size());
        needs.groups.emplace_back(group, true, std::uint16_t{1}, std::vector<std::uint16_t>{0});
    }
    needs.attention = attention;
    needs.states = states;
    return needs;
}

std::vector<bool> kinds_of(const Needs& needs) {
    std::vector<bool> kinds;
    for (const GroupNeed& need : needs.groups) {
        kinds.push_back(need.is_state);
    }
    return kinds;
}

// What is there, in the order of its use.
auto contents(const Index& index) {
    const Survey found = index.survey({0, 0}, true);
    std::vector<std::tuple<std::array<std::uint8_t, digest_bytes>, std::uint16_t, std::uint32_t>> rows;
    for (const Row& row : found.rows) {
        rows.emplace_back(index.nodes().key(found.nodes[row.node]).bytes, row.group, row.slot.size_bytes);
    }
    return rows;
}

// The same in steps: all that the text has is named, and victims are taken one by one.
Counted by_hand(Index& index, const CountedWrite& write) {
    Counted counted;
    std::vector<Name> names;
    for (const GroupNeed& need : write.needs->groups) {
        for (std::uint32_t node = 0; node < write.path.blocks; ++node) {
            const bool is_wanted = !need.is_state || std::ranges::any_of(write.states, [&](const CountedState& state) {
                return state.blocks == node + 1;
            });
            if (is_wanted) {
                names.push_back({node, need.group, 0, {0, 1}, {}});
            }
        }
    }
    WriteSet set = index.plan(write.path, names, false);
    std::uint64_t needed_bytes = 0;
    std::vector<std::uint64_t> ready;
    for (Row& row : set.missing) {
        row.slot.size_bytes = block_bytes;
        for (const CountedState& state : write.states) {
            if (write.needs->groups[row.group].is_state && state.blocks == row.node + 1) {
                row.slot.size_bytes = state.size_bytes;
            }
        }
        needed_bytes += row.slot.size_bytes;
        ready.push_back(ready.size());
    }
    const auto capacity_bytes = static_cast<std::uint64_t>(write.capacity_bytes);
    if (set.missing.empty()) {
        return counted;
    }
    if (needed_bytes > capacity_bytes) {
        return {CountedOutcome::no_room, 0, 0};
    }
    index.enter(set, write.path, write.salt, {}, {});
    const auto needs_more = [&] {
        return index.committed_bytes() + needed_bytes > capacity_bytes + counted.evicted_bytes;
    };
    for (std::uint64_t target = 1; needs_more();) {
        const std::uint64_t chosen = index.choose(target);
        if (chosen < target) {
            index.drop_choice();
            index.undo(set);
            return {CountedOutcome::no_room, 0, 0};
        }
        target = chosen + 1;
        counted.evicted_bytes = 0;
        for (const Slot& slot : index.chosen_slots(index.chosen_count())) {
            counted.evicted_bytes += slot.size_bytes;
        }
    }
    index.evict_chosen();
    index.commit(set, ready, std::vector<std::uint64_t>(ready.size()), {});
    index.leave(set);
    index.let_go(set);
    counted.written_bytes = needed_bytes;
    return counted;
}

void test_beside_each_step(std::uint64_t seed, bool attention, bool states) {
    Random random(seed);
    const Needs needs = needs_of(attention, states);
    Index index(kinds_of(needs), 16, true, seed);
    Index other(kinds_of(needs), 16, true, seed + 1);
    const double capacity_bytes = 500 + draw(random, 3000);
    int refused = 0;
    std::uint64_t evicted_bytes = 0;
    for (int step = 0; step < 400; ++step) {
        const Text text(random);
        if (draw(random, 3) == 0) {
            index.touch_path(text.path());
            other.touch_path(text.path());
        }
        const CountedWrite write{text.path(), "", &needs, block_bytes, text.states, capacity_bytes, records_max};
        const std::uint64_t before_bytes = index.committed_bytes();
        const Counted counted = write_counted(index, write);
        const Counted expected = by_hand(other, write);
        check(counted.outcome == expected.outcome && counted.written_bytes == expected.written_bytes &&
                  counted.evicted_bytes == expected.evicted_bytes,
              "a counted write differs from its steps");
        check(contents(index) == contents(other), "what is there differs");
        check(index.committed_bytes() + counted.evicted_bytes == before_bytes + counted.written_bytes, "bytes got lost");
        check(static_cast<double>(index.committed_bytes()) <= capacity_bytes, "more is there than fits");
        check(index.check().empty(), index.check());
        refused += counted.outcome == CountedOutcome::no_room ? 1 : 0;
        evicted_bytes += counted.evicted_bytes;
    }
    check(evicted_bytes > 0, "nothing was evicted");
    check(refused > 0 || capacity_bytes > 1000, "nothing was refused");
}

void test_limits() {
    Random random(1);
    const Needs needs = needs_of(true, true);
    Index index(kinds_of(needs), 16, true, 1);
    Text text(random);
    while (text.keys.size() < 3) {
        text = Text(random);
    }
    CountedWrite write{text.path(), "", &needs, block_bytes, {}, 1e9, text.keys.size() - 1};
    check(write_counted(index, write).outcome == CountedOutcome::too_many, "more records than may be");
    check(index.record_count() == 0 && index.node_count() == 0, "a refused write left something");
    write.records_max = text.keys.size();
    check(write_counted(index, write).written_bytes == text.keys.size() * block_bytes, "a write was not counted");
    std::swap(text.keys[0], text.keys[1]);
    check(write_counted(index, write).outcome == CountedOutcome::wrong_path, "a key names two prefixes");
}

// Whatever allocation fails: the index is sound, and the write comes through afterwards.
void test_memory_runs_out() {
    Random random(2);
    const Needs needs = needs_of(true, true);
    Index index(kinds_of(needs), 16, true, 2);
    int failures = 0;
    for (int step = 0; step < 40; ++step) {
        const Text text(random);
        const CountedWrite write{text.path(), "", &needs, block_bytes, text.states, 2000.0, records_max};
        for (int allocation = 0;; ++allocation) {
            try {
                allocations_left = allocation;
                write_counted(index, write);
                allocations_left.reset();
                break;
            } catch (const std::bad_alloc&) {
                allocations_left.reset();
                check(index.check().empty(), index.check());
                ++failures;
            }
        }
    }
    check(failures > 100, "memory hardly ever ran out");
}

}  // namespace

int main() {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
        test_beside_each_step(seed, true, true);
        test_beside_each_step(seed, true, false);
        test_beside_each_step(seed, false, true);
    }
    test_limits();
    test_memory_runs_out();
}
