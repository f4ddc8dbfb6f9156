// Restoring an index from what was kept elsewhere, against a plain model; surveys, moves and the loss of a part of a
// tier. Random, from fixed seeds.
#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "../index/index.h"
#include "check.h"

using namespace kvstore::index;
using kvstore::testing::check;

namespace {

constexpr std::uint32_t block_tokens = 2;
constexpr SlotRange everything{0, 0};

Digest digest(std::uint8_t kind, std::uint64_t number) {
    Digest result{};
    result.bytes[0] = kind;
    std::memcpy(result.bytes.data() + 1, &number, sizeof number);
    return result;
}

// A random tree of prefixes under some roots, with records: attention groups 0 and 1, states in group 2.
struct Kept {
    struct Node {
        Digest key;
        Digest parent;
        std::uint32_t end_tokens;
        std::uint32_t root;
        std::vector<std::uint32_t> tail_ids;
        std::uint32_t above;  // none for the first
    };
    std::vector<Node> nodes;
    std::vector<KeptRoot> roots;
    std::vector<Row> rows;

    std::vector<KeptNode> kept_nodes() const {
        std::vector<KeptNode> kept;
        for (const Node& node : nodes) {
            kept.push_back({&node.key, &node.parent, node.end_tokens, node.root, node.tail_ids});
        }
        return kept;
    }
    std::vector<bool> restore_into(Index& index) const { return index.restore(block_tokens, kept_nodes(), roots, rows); }
};

class Case {
  public:
    explicit Case(std::uint64_t seed) : random_(seed) {
        for (std::uint32_t root = 0; root < 3; ++root) {
            kept.roots.push_back({digest(1, root), root == 0 ? "" : "tenant " + std::to_string(root)});
        }
        const std::uint32_t count = 1 + draw(40);
        for (std::uint32_t number = 0; number < count; ++number) {
            add_node(number);
        }
        for (std::uint32_t number = 0; number < 3 * count; ++number) {
            add_row();
        }
    }

    std::uint32_t draw(std::uint32_t below) { return static_cast<std::uint32_t>(random_() % below); }

    void lose_some() {
        std::erase_if(kept.rows, [&](const Row&) { return draw(6) == 0; });
        // A node that is lost takes nothing with it here: its row only names nothing any more.
        for (Kept::Node& node : kept.nodes) {
            if (draw(12) == 0) {
                node.key = digest(9, next_++);  // so that what named it as its parent hangs in the air
                node.parent = digest(8, next_++);
            }
        }
    }

    void shuffle_nodes() {
        std::vector<std::uint32_t> order(kept.nodes.size());
        for (std::uint32_t number = 0; number < order.size(); ++number) {
            order[number] = number;
        }
        std::shuffle(order.begin(), order.end(), random_);
        std::vector<Kept::Node> shuffled;
        std::vector<std::uint32_t> place(order.size());
        for (std::uint32_t number = 0; number < order.size(); ++number) {
            place[order[number]] = number;
            shuffled.push_back(kept.nodes[order[number]]);
        }
        for (Kept::Node& node : shuffled) {
            node.above = node.above == none ? none : place[node.above];
        }
        for (Row& row : kept.rows) {
            row.node = place[row.node];
        }
        kept.nodes = std::move(shuffled);
    }

    // Which rows must be taken: said once more, plainly.
    std::vector<bool> expected() const {
        const auto hangs = [&](std::uint32_t node) {
            for (; node != none; node = kept.nodes[node].above) {
                const Kept::Node& at = kept.nodes[node];
                if (at.parent != (at.above == none ? kept.roots[at.root].key : kept.nodes[at.above].key)) {
                    return false;
                }
            }
            return true;
        };
        std::vector<bool> taken(kept.rows.size());
        const auto covered = [&](std::uint32_t node, const Row& by) {
            for (std::uint16_t unit = by.units.start; unit < by.units.stop; ++unit) {
                bool is_there = false;
                for (std::size_t row = 0; row < kept.rows.size(); ++row) {
                    const Row& other = kept.rows[row];
                    is_there |= taken[row] && other.node == node && other.group == by.group &&
                                other.units.start <= unit && unit < other.units.stop;
                }
                if (!is_there) {
                    return false;
                }
            }
            return true;
        };
        std::vector<std::uint32_t> order;
        for (std::uint32_t row = 0; row < kept.rows.size(); ++row) {
            order.push_back(row);
        }
        std::stable_sort(order.begin(), order.end(), [&](std::uint32_t left, std::uint32_t right) {
            return kept.nodes[kept.rows[left].node].end_tokens < kept.nodes[kept.rows[right].node].end_tokens;
        });
        for (const bool is_state : {false, true}) {
            for (const std::uint32_t number : order) {
                const Row& row = kept.rows[number];
                if ((row.group == 2) != is_state || !hangs(row.node)) {
                    continue;
                }
                std::size_t same = kept.rows.size();
                bool has_attention = false;
                for (std::size_t other = 0; other < kept.rows.size(); ++other) {
                    const Row& earlier = kept.rows[other];
                    if (!taken[other] || earlier.node != row.node) {
                        continue;
                    }
                    has_attention |= earlier.group != 2;
                    if (earlier.group == row.group && earlier.units == row.units && earlier.grid == row.grid) {
                        same = other;
                    }
                }
                const std::uint32_t above = kept.nodes[row.node].above;
                if (same != kept.rows.size()) {
                    taken[same] = false;
                    taken[number] = true;
                } else {
                    taken[number] = is_state ? has_attention : above == none || covered(above, row);
                }
            }
        }
        return taken;
    }

    Kept kept;

  private:
    void add_node(std::uint32_t number) {
        Kept::Node node{digest(2, number), {}, 0, draw(3), {}, none};
        if (number != 0 && draw(5) != 0) {
            const std::uint32_t above = draw(number);
            if (kept.nodes[above].tail_ids.empty()) {
                node.above = above;
                node.root = kept.nodes[above].root;
            }
        }
        node.parent = node.above == none ? kept.roots[node.root].key : kept.nodes[node.above].key;
        node.end_tokens = (node.above == none ? 0 : kept.nodes[node.above].end_tokens) + block_tokens;
        if (draw(4) == 0) {
            node.tail_ids = {number};
            node.end_tokens -= 1;
        }
        kept.nodes.push_back(node);
    }

    void add_row() {
        const std::array<Units, 3> shards{Units{0, 2}, Units{0, 1}, Units{1, 2}};
        const auto node = draw(static_cast<std::uint32_t>(kept.nodes.size()));
        const auto group = static_cast<std::uint16_t>(draw(3));
        const Digest grid = draw(3) == 0 ? digest(5, draw(2)) : Digest{};
        const Slot slot{draw(4), next_++, 4096};
        kept.rows.push_back({node, group, 0, shards[draw(8) == 0 ? 1 + draw(2) : 0], slot, grid, 7});
        // Mostly the whole path is kept with it.
        if (draw(4) != 0) {
            for (std::uint32_t above = kept.nodes[node].above; above != none; above = kept.nodes[above].above) {
                for (const std::uint16_t each : {std::uint16_t{0}, std::uint16_t{1}}) {
                    kept.rows.push_back({above, each, 0, Units{0, 2}, {draw(4), next_++, 4096}, Digest{}, 7});
                }
            }
        }
    }

    std::mt19937_64 random_;
    std::uint64_t next_ = 0;
};

std::vector<std::uint64_t> slots_of(const std::vector<Row>& rows) {
    std::vector<std::uint64_t> slots;
    for (const Row& row : rows) {
        slots.push_back(row.slot.generation);
    }
    return slots;
}

void empty(Index& index) {
    index.choose(~std::uint64_t{0});
    index.evict_chosen();
    index.drop_ghosts(1000);
    check(index.check().empty() && index.memory_bytes() == 0, "the empty index holds something");
}

void restores_what_hangs_together(std::uint64_t seed) {
    Case one(seed);
    if (seed % 3 != 0) {
        one.lose_some();
    }
    one.shuffle_nodes();
    Index index({false, false, true}, 20, true, seed);
    const std::vector<bool> taken = one.kept.restore_into(index);
    check(index.check().empty(), index.check());
    check(taken == one.expected(), "other records were restored than hang together");
    std::set<std::uint64_t> expected;
    for (std::size_t row = 0; row < taken.size(); ++row) {
        if (taken[row]) {
            expected.insert(one.kept.rows[row].slot.generation);
        }
    }
    const Survey found = index.survey(everything, true);
    const std::vector<std::uint64_t> slots = slots_of(found.rows);
    check(std::set(slots.begin(), slots.end()) == expected && slots.size() == expected.size(),
          "a survey names other records than are there");
    check(index.committed_bytes() == 4096 * expected.size(), "bytes are miscounted");

    // What a survey gives restores the same index, in the same order of use.
    Kept again;
    again.roots = one.kept.roots;
    again.rows = found.rows;
    for (const NodeId id : found.nodes) {
        const Nodes& nodes = index.nodes();
        const auto ids = nodes.has(id, is_tail) ? nodes.tail_ids(id) : std::span<const std::uint32_t>{};
        std::uint32_t root = 0;
        while (!(again.roots[root].key == nodes.key(nodes[id].root))) {
            ++root;
        }
        check(again.roots[root].salt == index.salt(id), "a salt was lost");
        again.nodes.push_back({nodes.key(id), nodes.key(nodes.parent(id)), nodes[id].end_tokens, root,
                               {ids.begin(), ids.end()}, none});
    }
    Index copy({false, false, true}, 20, true, seed + 1);
    const std::vector<bool> all = again.restore_into(copy);
    check(std::ranges::find(all, false) == all.end(), "a survey does not hang together");
    check(slots_of(copy.survey(everything, true).rows) == slots, "the order of use was lost");
    check(kvstore::testing::throws<std::invalid_argument>([&] { again.restore_into(copy); }, "empty index") ||
              found.nodes.empty(),
          "something was restored into an index that holds something");

    // Records move, and one part of the tier is lost with what only it made reachable.
    copy.watch(true);
    for (const Row& row : found.rows) {
        const Slot to{row.slot.index + 10, row.slot.generation, row.slot.size_bytes};
        check(copy.relocate(index.nodes().key(found.nodes[row.node]), row.slot, to), "a record could not be moved");
        check(!copy.relocate(index.nodes().key(found.nodes[row.node]), row.slot, to), "a record was moved twice");
    }
    check(copy.survey({~std::uint64_t{0}, 1}, false).rows.empty(), "a record lies where it lay");
    std::size_t surveyed = 0;
    for (std::uint64_t part = 10; part < 14; ++part) {
        surveyed += copy.survey({~std::uint64_t{0}, part}, false).rows.size();
    }
    check(surveyed == found.rows.size(), "a survey of a part names records of another one");
    const std::size_t before = copy.record_count();
    const std::vector<Slot> freed = copy.condemn_all({~std::uint64_t{0}, 11});
    check(copy.check().empty(), copy.check());
    check(copy.survey({~std::uint64_t{0}, 11}, false).rows.empty(), "a record outlived what it lay on");
    check(copy.record_count() + freed.size() == before, "records are miscounted");
    std::set<std::pair<std::array<std::uint8_t, 32>, bool>> removed;
    for (const Change& change : copy.changes()) {
        check(!change.is_added && removed.emplace(change.key.bytes, change.is_state).second, "a removal was noted twice");
    }
    check(removed.empty() == freed.empty(), "a removal was not noted");
    copy.watch(false);
    empty(copy);
    empty(index);
    // Also an index that held something before, whose records have numbers in another order.
    index.drop_ghosts(index.ghost_count());
    check(one.kept.restore_into(index) == taken && index.check().empty(), "an index that was emptied was restored otherwise");
    check(slots_of(index.survey(everything, true).rows) == slots, "or in another order of use");
    empty(index);
}

// A use in between counts: who was used last goes last.
void a_touched_path_stays() {
    Kept kept;
    kept.roots.push_back({digest(1, 0), ""});
    for (std::uint32_t number = 0; number < 3; ++number) {
        kept.nodes.push_back({digest(2, number), kept.roots[0].key, block_tokens, 0, {}, none});
        kept.rows.push_back({number, 0, 0, {0, 1}, {number, number, 4096}, Digest{}, 0});
    }
    Index index({false}, 20, true, 1);
    kept.restore_into(index);
    const Path path{kept.roots[0].key, block_tokens, &kept.nodes[0].key, 1, nullptr, {}};
    index.touch_path(path);
    index.choose(2 * 4096);
    const std::vector<Slot> freed = index.evict_chosen();
    check(freed.size() == 2 && freed[0].index == 1 && freed[1].index == 2, "what was just used was evicted first");
}

// Models without attention: nodes without records lead to states.
void states_alone() {
    Kept kept;
    kept.roots.push_back({digest(1, 0), "salt"});
    for (std::uint32_t number = 0; number < 4; ++number) {
        const Digest& above = number == 0 ? kept.roots[0].key : kept.nodes[number - 1].key;
        kept.nodes.push_back({digest(2, number), above, (number + 1) * block_tokens, 0, {}, none});
    }
    kept.rows.push_back({2, 0, 0, {0, 1}, {0, 0, 4096}, Digest{}, 0});
    Index index({true}, 20, true, 1);
    check(kept.restore_into(index) == std::vector<bool>{true}, "a state without attention was lost");
    check(index.check().empty(), index.check());
    check(index.node_count() == 3 && index.ghost_count() == 2, "a node that leads to nothing was kept, or one that does lost");
    check(index.survey(everything, false).nodes.size() == 3, "a survey lacks nodes");
    empty(index);
}

// Rows that contradict each other, or the form of a tree.
void nonsense_is_left_out() {
    Kept kept;
    kept.roots = {{digest(1, 0), "a"}, {digest(1, 0), "b"}};
    const Digest root = kept.roots[0].key;
    const auto add = [&](const Digest& key, const Digest& parent, std::uint32_t end, std::uint32_t root_number,
                         std::vector<std::uint32_t> ids) {
        const auto number = static_cast<std::uint32_t>(kept.nodes.size());
        kept.nodes.push_back({key, parent, end, root_number, std::move(ids), none});
        kept.rows.push_back({number, 0, 0, {0, 1}, {number, number, 4096}, Digest{}, 0});
    };
    add(digest(2, 0), root, 2, 0, {});               // taken
    add(digest(2, 1), root, 2, 1, {});               // the root with another salt
    add(digest(2, 2), root, 3, 0, {});               // ends elsewhere
    add(digest(2, 3), digest(2, 0), 4, 0, {1, 2});   // a tail as long as a block
    add(digest(2, 4), digest(2, 4), 4, 0, {});       // its own parent
    add(root, digest(2, 0), 4, 0, {});               // a root below itself
    add(digest(2, 5), digest(2, 0), 3, 0, {9});      // a tail, taken
    add(digest(2, 6), digest(2, 5), 5, 0, {});       // below a tail
    add(digest(2, 5), digest(2, 0), 3, 0, {8});      // the same key with other ids
    add(digest(2, 0), root, 2, 0, {});               // once more: the later record counts
    Index index({false}, 20, true, 1);
    const std::vector<bool> expected{false, false, false, false, false, false, true, false, false, true};
    check(kept.restore_into(index) == expected, "nonsense was restored, or sense was not");
    check(index.check().empty(), index.check());
    empty(index);
}

}  // namespace

int main() {
    for (std::uint64_t seed = 0; seed < 600; ++seed) {
        restores_what_hangs_together(seed);
    }
    a_touched_path_stays();
    states_alone();
    nonsense_is_left_out();
}
