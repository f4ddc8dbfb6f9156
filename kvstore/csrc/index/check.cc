// Every invariant of the index, for tests.
#include "index.h"

namespace kvstore::index {

std::string Index::check() const {
    if (const char* wrong = nodes_.check()) {
        return wrong;
    }
    std::string wrong;
    std::uint64_t bytes = 0;
    std::uint32_t records = 0;
    std::uint32_t ghosts = 0;
    std::uint32_t idle = 0;
    std::uint32_t ranked = 0;
    std::uint32_t roots = 0;
    std::uint32_t timed = 0;
    std::vector<std::uint64_t> salt_bytes(salts_.size());
    std::vector<std::uint32_t> salt_records(salts_.size());
    std::vector<std::uint32_t> salt_nodes(salts_.size());
    std::vector<std::uint32_t> salt_ranked(salts_.size());
    std::vector<std::uint32_t> grid_users(1);
    const auto expect = [&](bool holds, const char* what) {
        if (!holds && wrong.empty()) {
            wrong = what;
        }
    };
    nodes_.each([&](NodeId id) {
        const Node& node = nodes_[id];
        if (nodes_.has(id, is_root)) {
            ++roots;
            return;
        }
        if (nodes_.has(id, is_detached)) {
            expect(node.attention_holds + node.state_holds != 0, "a forgotten node is held by nobody and not free");
            expect(node.first_record == none && node.reserved == 0, "a forgotten node has records");
            return;
        }
        const bool has_none = !holds_records(id) && node.reserved == 0;
        expect(nodes_.has(id, is_ghost) == has_none, "a node is wrongly a ghost, or no ghost");
        expect(nodes_.has(id, is_idle) == (has_none && nodes_.is_leaf(id)), "a ghost is wrongly idle, or not");
        expect(!has_none || !nodes_.has(id, is_tail | has_handover), "a tail or a hand-over outlived its records");
        expect(nodes_.has(id, is_pending) == (node.pending != 0), "a node is wrongly pending, or not");
        expect(!nodes_.has(id, is_chosen) && !nodes_.has(id, is_chosen << 1), "a victim was chosen and left");
        ghosts += nodes_.has(id, is_ghost);
        salt_nodes[salt_of(id)] += !nodes_.has(id, is_ghost);
        idle += nodes_.has(id, is_idle);
        std::uint32_t of_kind[2] = {0, 0};
        std::uint64_t order = 0;
        for (RecordId at = node.first_record; at != none; at = records_[at].next) {
            const Record& record = records_[at];
            ++records;
            bytes += record.slot_bytes;
            salt_bytes[salt_of(id)] += record.slot_bytes;
            ++salt_records[salt_of(id)];
            if (record.grid >= grid_users.size()) {
                grid_users.resize(record.grid + 1);
            }
            ++grid_users[record.grid];
            expect(record.order() >= order, "a node's records are out of order");
            order = record.order();
            ++of_kind[is_state_group_[record.group] ? 1 : 0];
            const NodeId parent = nodes_.parent(id);
            if (!is_state_group_[record.group] && !nodes_.has(parent, is_root)) {
                expect(find_records(parent, record.group, record.span, record.units, any_grid, record.is_lossy, nullptr),
                       "attention is not contiguous from the root");
            }
        }
        for (const unsigned kind : {0U, 1U}) {
            const bool is_there = of_kind[kind] != 0;
            expect(nodes_.has(id, kind != 0 ? has_states : has_attention) == is_there, "a node forgot what it has");
            expect(nodes_.has(id, is_ranked << kind) == is_there, "what a node has is not ranked, or ranked without it");
            ranked += is_there;
            salt_ranked[salt_of(id)] += is_there;
            const Moment ends_at = lives_.of(nodes_, handle_of(id, kind != 0));
            timed += ends_at != lasting;
            expect(is_there || ends_at == lasting, "what is not there has an end");
            const NodeId parent = nodes_.parent(id);
            expect(kind != 0 || !is_there || nodes_.has(parent, is_root) ||
                       ends_at <= lives_.of(nodes_, handle_of(parent, false)),
                   "attention ends before what hangs on it");
        }
    });
    expect(timed == lives_.size(), "what has an end is miscounted");
    expect(lives_.entry_count() <= 4 * lives_.size() + 4096 + 64, "ends of long ago pile up");
    expect(ghosts == ghosts_ && idle == idle_.size(), "ghosts are miscounted");
    expect(records == records_.size() && bytes == committed_bytes_, "records are miscounted");
    expect(!keeps_order_ || ranked == order_.size(), "the order of use lacks something");
    std::uint32_t salt_roots = 0;
    for (std::size_t number = 0; number < salts_.size(); ++number) {
        expect(salts_[number].bytes == salt_bytes[number], "a salt's bytes are miscounted");
        expect(salts_[number].records == salt_records[number], "a salt's records are miscounted");
        expect(salts_[number].nodes == salt_nodes[number], "a salt's nodes are miscounted");
        expect(!keeps_salt_orders_ || salts_[number].order.size() == salt_ranked[number],
               "a salt's order of use lacks something");
        salt_roots += salts_[number].roots;
    }
    expect(salt_roots == roots + changes_.size(), "roots are miscounted");
    std::uint64_t grid_uses = 0;
    for (GridId grid = 1; grid < grid_users.size(); ++grid) {
        grid_uses += grid_users[grid];
        expect(grids_.users(grid) >= grid_users[grid], "a grid is forgotten before its records");
    }
    expect(grids_.uses() == grid_uses + grid_holds_, "grids are miscounted");
    return wrong;
}

}  // namespace kvstore::index
