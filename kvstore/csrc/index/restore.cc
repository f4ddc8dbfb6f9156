// Filling an index with what was kept elsewhere: what hangs together of it, in one step.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "index.h"

namespace kvstore::index {

namespace {

// Numbers of nodes, by the length at which they end; of equal ones in their order.
std::vector<std::uint32_t> parents_first(std::span<const KeptNode> nodes) {
    std::vector<std::uint32_t> order(nodes.size());
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(), [&](std::uint32_t left, std::uint32_t right) {
        return nodes[left].end_tokens < nodes[right].end_tokens;
    });
    return order;
}

}  // namespace

// The node of each row, `none` where it does not hang on a root or contradicts what came before. `made`: parents first.
std::vector<NodeId> Index::restore_nodes(std::uint32_t block_tokens, std::span<const KeptNode> nodes,
                                         std::span<const KeptRoot> roots, std::vector<NodeId>& made) {
    std::vector<NodeId> ids(nodes.size(), none);
    nodes_.reserve(nodes.size() + roots.size(), 0);
    while (keeps_salt_orders_ && salt_links_.size() < nodes_.id_count() + nodes.size() + roots.size()) {
        salt_links_.append({});
    }
    for (const std::uint32_t number : parents_first(nodes)) {
        const KeptNode& kept = nodes[number];
        const KeptRoot& kept_root = roots[kept.root];
        const bool is_first = *kept.parent == kept_root.key;
        NodeId parent = nodes_.find(*kept.parent);
        if (is_first ? parent != none && (!nodes_.has(parent, is_root) || salts_[nodes_[parent].root].name != kept_root.salt)
                     : parent == none || nodes_.has(parent, is_root | is_tail)) {
            continue;
        }
        const std::uint32_t begin = parent == none ? 0 : nodes_[parent].end_tokens;
        const auto tail_tokens = static_cast<std::uint32_t>(kept.tail_ids.size());
        if (tail_tokens >= block_tokens || *kept.key == *kept.parent ||
            kept.end_tokens != begin + (tail_tokens != 0 ? tail_tokens : block_tokens)) {
            continue;
        }
        const NodeId known = nodes_.find(*kept.key);
        if (known != none) {
            const bool is_same = !nodes_.has(known, is_root) && nodes_.parent(known) == parent &&
                                 nodes_.has(known, is_tail) == (tail_tokens != 0) &&
                                 (tail_tokens == 0 || std::ranges::equal(nodes_.tail_ids(known), kept.tail_ids));
            ids[number] = is_same ? known : none;
            continue;
        }
        if (parent == none) {
            parent = nodes_.add_root(kept_root.key, use_salt(kept_root.salt));
        }
        ids[number] = tail_tokens != 0 ? nodes_.add_tail(*kept.key, parent, kept.end_tokens, kept.tail_ids)
                                       : nodes_.add(*kept.key, parent, kept.end_tokens);
        ++owner(ids[number]).nodes;
        made.push_back(ids[number]);
    }
    return ids;
}

// Whether the record is there now. `rows_of`: which row each record came from.
bool Index::restore_record(NodeId id, const Row& row, std::uint32_t number, std::vector<std::uint32_t>& rows_of,
                           std::vector<bool>& taken) {
    const GridId grid = grids_.find(row.grid);
    const std::uint32_t place = (std::uint32_t{row.group} << 16) | row.span;
    for (RecordId at = first_of(id, place); at != none && records_[at].place() == place; at = records_[at].next) {
        Record& record = records_[at];
        if (record.units == row.units && record.grid == grid) {
            committed_bytes_ += row.slot.size_bytes - std::uint64_t{record.slot_bytes};
            salts_[salt_of(id)].bytes += row.slot.size_bytes - std::uint64_t{record.slot_bytes};
            record.slot_index = row.slot.index;
            record.slot_generation = row.slot.generation;
            record.slot_bytes = row.slot.size_bytes;
            record.cost_us = row.cost_us;
            taken[rows_of[at]] = false;
            rows_of[at] = number;
            return true;
        }
    }
    if (!is_reachable(id, row, false)) {
        return false;
    }
    const RecordId added = add_record(id, row, row.cost_us, {});
    if (rows_of.size() <= added) {
        rows_of.resize(std::size_t{added} + 1);
    }
    rows_of[added] = number;
    return true;
}

// What was used last stands last, an ancestor after all that hangs on it.
void Index::restore_order(const std::vector<NodeId>& made, const std::vector<std::uint32_t>& rows_of) {
    constexpr std::uint32_t never = 0;
    struct Use {
        std::uint32_t states = never;
        std::uint32_t attention = never;
    };
    std::vector<Use> uses;
    for (const NodeId id : made) {
        uses.resize(std::max<std::size_t>(uses.size(), std::size_t{id} + 1));
    }
    std::vector<Handle> handles;
    for (std::size_t number = made.size(); number-- > 0;) {  // children first
        const NodeId id = made[number];
        Use& use = uses[id];
        for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
            std::uint32_t& last = is_state_group_[records_[at].group] ? use.states : use.attention;
            last = std::max(last, rows_of[at] + 1);
        }
        use.attention = std::max(use.attention, use.states);
        const NodeId parent = nodes_.parent(id);
        if (!nodes_.has(parent, is_root)) {
            uses[parent].attention = std::max(uses[parent].attention, use.attention);
        }
        if (nodes_.has(id, has_states)) {
            handles.push_back(handle_of(id, true));
        }
        if (nodes_.has(id, has_attention)) {
            handles.push_back(handle_of(id, false));
        }
    }
    const auto used = [&](Handle handle) {
        const Use& use = uses[node_of(handle)];
        return kind_of(handle) != 0 ? use.states : use.attention;
    };
    std::stable_sort(handles.begin(), handles.end(),
                     [&](Handle left, Handle right) { return used(left) < used(right); });
    for (const Handle handle : handles) {
        refresh(node_of(handle), kind_of(handle) != 0);
    }
}

std::vector<bool> Index::restore(std::uint32_t block_tokens, std::span<const KeptNode> nodes,
                                 std::span<const KeptRoot> roots, std::span<const Row> rows) {
    if (nodes_.prefix_count() != 0 || records_.size() != 0) {
        throw std::invalid_argument("records are restored into an empty index only");
    }
    std::vector<NodeId> made;
    made.reserve(nodes.size());
    const std::vector<NodeId> ids = restore_nodes(block_tokens, nodes, roots, made);
    // A block is reachable only through the one before it; within a node, later records replace earlier ones.
    std::vector<std::uint32_t> order(rows.size());
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(), [&](std::uint32_t left, std::uint32_t right) {
        return nodes[rows[left].node].end_tokens < nodes[rows[right].node].end_tokens;
    });
    const bool has_attention_groups = std::ranges::find(is_state_group_, false) != is_state_group_.end();
    std::vector<bool> taken(rows.size());
    std::vector<std::uint32_t> rows_of;
    records_.reserve(rows.size());
    for (const bool is_state : {false, true}) {
        for (const std::uint32_t number : order) {
            const Row& row = rows[number];
            const NodeId id = ids[row.node];
            if (id != none && is_state_group_[row.group] == is_state &&
                (!is_state || !has_attention_groups || nodes_.has(id, has_attention))) {
                taken[number] = restore_record(id, row, number, rows_of, taken);
            }
        }
    }
    restore_order(made, rows_of);
    for (std::size_t number = made.size(); number-- > 0;) {
        if (!holds_records(made[number]) && nodes_.is_leaf(made[number])) {
            forget(made[number]);
        } else {
            retire(made[number]);
        }
    }
    return taken;
}

}  // namespace kvstore::index
