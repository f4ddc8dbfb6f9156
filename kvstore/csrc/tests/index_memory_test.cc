// The index when memory runs out: whatever allocation fails, a call has done nothing, and the next one works.
#include <new>
#include <optional>
#include <vector>

#include "../index/index.h"
#include "check.h"
#include "failing_memory.h"

using namespace kvstore::index;
using kvstore::testing::allocations_left;
using kvstore::testing::check;

namespace {

constexpr std::uint32_t block_tokens = 2;

Digest digest(std::uint8_t kind, std::uint32_t number) {
    Digest result{};
    result.bytes[0] = kind;
    std::memcpy(result.bytes.data() + 1, &number, sizeof number);
    return result;
}

// A prompt of some blocks and a tail, under a root, a salt and a grid of its own.
struct Case {
    explicit Case(std::uint32_t number_, std::uint32_t blocks) : number(number_), root(digest(1, number)), tail(digest(2, number)) {
        for (std::uint32_t block = 0; block < blocks; ++block) {
            keys.push_back(digest(3, number * 10000 + block));
        }
    }
    Path path() const {
        return {root, block_tokens, keys.data(), static_cast<std::uint32_t>(keys.size()), &tail, tail_ids};
    }
    std::vector<Name> names() const {
        std::vector<Name> all;
        for (std::uint32_t node = 0; node < path().size(); ++node) {
            all.push_back({node, 0, 0, {0, 2}, digest(4, number)});
            all.push_back({node, 1, 0, {0, 2}, digest(4, number)});
        }
        return all;
    }
    std::uint32_t number;
    Digest root;
    Digest tail;
    std::vector<Digest> keys;
    std::vector<std::uint32_t> tail_ids{7};
};

// Runs `action` with the first allocation failing, then the second, until it comes through. What `unchanged` says must
// be the same after each failure.
template <typename Action, typename Unchanged>
int until_it_succeeds(const Index& index, Action action, Unchanged unchanged) {
    const auto before = unchanged();
    for (int allocation = 0;; ++allocation) {
        try {
            allocations_left = allocation;
            action();
            allocations_left.reset();
            return allocation;
        } catch (const std::bad_alloc&) {
            check(index.check().empty(), index.check());
            check(unchanged() == before, "a call that failed has changed something");
        }
    }
}

void test_every_allocation(bool keeps_order, bool is_watched) {
    Index index({false, true}, 8, keeps_order, 5);
    index.keep_salt_orders();
    index.watch(is_watched);
    int failures = 0;
    const auto counts = [&] {
        return std::tuple(index.node_count(), index.record_count(), index.committed_bytes(), index.memory_bytes(),
                          index.changes().size());
    };
    for (std::uint32_t number = 0; number < 40; ++number) {
        const Case prompt(number, number == 20 ? 1500 : 1 + number % 5);
        const std::vector<Name> names = prompt.names();
        WriteSet set = index.plan(prompt.path(), names, false);
        check(set.missing.size() == names.size(), "something is there already");
        for (std::size_t at = 0; at < set.missing.size(); ++at) {
            set.missing[at].slot = {number * 10000 + at, 1, 4096};
        }
        const std::string salt = "the salt of a tenant, too long to be kept inline, number " + std::to_string(number);
        failures += until_it_succeeds(index, [&] { index.enter(set, prompt.path(), salt, {}, {0}); }, counts);
        std::vector<std::uint64_t> ready(set.missing.size());
        for (std::size_t at = 0; at < ready.size(); ++at) {
            ready[at] = at;
        }
        const std::vector<std::uint64_t> costs(ready.size(), 1);
        const Life life{number % 2 == 0 ? lasting : number, prompt.path().size()};
        failures += until_it_succeeds(
            index, [&] { check(index.commit(set, ready, costs, {}, life).empty(), "given back"); }, counts);
        index.leave(set);
        index.let_go(set);
        check(index.check().empty(), index.check());
        static_cast<void>(index.take_events());
        index.drop_changes();
        const NodeId first = index.find(prompt.keys[0]);
        if (number % 3 == 0) {
            failures += until_it_succeeds(
                index, [&] { check(index.evict(first, false).size() == names.size(), "records were lost"); }, counts);
        } else if (number % 3 == 1) {
            failures += until_it_succeeds(
                index, [&] { check(index.condemn(first, false).size() == names.size(), "records were lost"); }, counts);
        } else if (number % 2 == 0) {
            const SlotRange range{~std::uint64_t{0}, number * 10000};
            failures += until_it_succeeds(
                index, [&] { check(index.condemn_all(range).size() == names.size(), "records were lost"); }, counts);
        }
        static_cast<void>(index.take_events());
        index.drop_changes();
        if (number % 5 == 4) {
            const NodeId node = index.find(prompt.keys[0]);
            const bool is_there = node != none && index.holds_records(node);
            failures += until_it_succeeds(
                index, [&] { check((index.set_end(prompt.path(), 1, 0) != 0) == is_there, "another has ended"); }, counts);
            failures += until_it_succeeds(
                index, [&] { check(index.expire(1).empty() != is_there, "it did not end"); }, counts);
            index.expire(1);  // where memory ran out half way, the rest
            check(node == none || !index.holds_records(node), "it did not end");
            static_cast<void>(index.take_events());
        }
    }
    check(failures > 400, "too few allocations failed: " + std::to_string(failures));
}

}  // namespace

int main() {
    for (const bool is_watched : {false, true}) {
        test_every_allocation(true, is_watched);
        test_every_allocation(false, is_watched);
    }
}
