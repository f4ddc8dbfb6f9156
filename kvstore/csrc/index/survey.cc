// What lies in a part of the tier, and records that move from one place to another there.
#include <algorithm>

#include "index.h"

namespace kvstore::index {

Survey Index::survey(SlotRange range, bool in_order) const {
    Survey found;
    std::vector<NodeId> holders;
    const auto add = [&](NodeId id, bool is_state) {
        for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
            if (is_state_group_[records_[at].group] == is_state && range.has(records_[at].slot())) {
                holders.push_back(id);
                found.rows.push_back(row_of(at, 0));
            }
        }
    };
    if (in_order && keeps_order_) {
        for (Handle handle = order_.oldest(); handle != none; handle = order_.later(nodes_, handle)) {
            add(node_of(handle), kind_of(handle) != 0);
        }
    } else {
        nodes_.each([&](NodeId id) {
            add(id, false);
            add(id, true);
        });
    }
    std::vector<bool> is_known;
    for (const NodeId holder : holders) {
        for (NodeId id = holder; !nodes_.has(id, is_root); id = nodes_.parent(id)) {
            if (is_known.size() <= id) {
                is_known.resize(std::size_t{id} + 1);
            }
            if (is_known[id]) {
                break;
            }
            is_known[id] = true;
            found.nodes.push_back(id);
        }
    }
    std::stable_sort(found.nodes.begin(), found.nodes.end(),
                     [&](NodeId left, NodeId right) { return nodes_[left].end_tokens < nodes_[right].end_tokens; });
    std::vector<std::uint32_t> numbers(is_known.size());
    for (std::uint32_t number = 0; number < found.nodes.size(); ++number) {
        numbers[found.nodes[number]] = number;
    }
    for (std::size_t row = 0; row < holders.size(); ++row) {
        found.rows[row].node = numbers[holders[row]];
    }
    return found;
}

bool Index::relocate(const Digest& key, const Slot& from, const Slot& to) {
    const NodeId id = find(key);
    if (id == none || from.size_bytes != to.size_bytes) {
        return false;
    }
    for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
        if (records_[at].slot() == from) {
            records_[at].slot_index = to.index;
            records_[at].slot_generation = to.generation;
            return true;
        }
    }
    return false;
}

}  // namespace kvstore::index
