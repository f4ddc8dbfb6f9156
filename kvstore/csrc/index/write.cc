// The write side: what is missing, the nodes of a writer, records that appear.
#include <algorithm>
#include <unordered_set>

#include "index.h"

namespace kvstore::index {

// The nodes of a path, `none` where there are none. False when the path puts a key elsewhere than it is known, or twice:
// a key names one prefix, so such a path was not made by hashing tokens.
bool Index::known_nodes(const Path& path, std::vector<NodeId>& known) const {
    const std::uint32_t count = path.size();
    known.assign(count, none);
    const NodeId root = nodes_.find(path.root);
    if (root != none && !nodes_.has(root, is_root)) {
        return false;
    }
    IdTable fresh;
    NodeId parent = root;
    for (std::uint32_t number = 0; number < count; ++number) {
        constexpr std::uint32_t ahead = 8;
        if (number + ahead < count) {
            nodes_.prefetch(path.key(number + ahead));
        }
        const Digest& key = path.key(number);
        const NodeId id = nodes_.find(key);
        if (id == none) {
            const std::uint32_t hash = nodes_.hash(key);
            if (key == path.root ||
                fresh.find(hash, [&](std::uint32_t other) { return path.key(other) == key; }) != none) {
                return false;
            }
            fresh.insert(hash, number);
        } else {
            const bool is_other_tail =
                nodes_.has(id, is_tail) != path.is_tail(number) ||
                (path.is_tail(number) && !std::ranges::equal(nodes_.tail_ids(id), path.tail_ids));
            if (nodes_.has(id, is_root) || nodes_.parent(id) != parent || is_other_tail ||
                nodes_[id].end_tokens != path.end_tokens(number)) {
                return false;
            }
        }
        known[number] = id;
        parent = id;
    }
    return true;
}

bool Index::is_gapless(std::span<const Name> names, const std::vector<NodeId>& known, bool is_lossy,
                       std::uint32_t& gap_node) const {
    const auto less = [](const Name& left, const Name& right) {
        return std::tuple(left.group, left.span, left.units.start, left.units.stop, left.node) <
               std::tuple(right.group, right.span, right.units.start, right.units.stop, right.node);
    };
    std::vector<Name> sorted(names.begin(), names.end());
    std::sort(sorted.begin(), sorted.end(), less);
    for (const Name& name : sorted) {
        if (name.node == 0 || is_state_group_[name.group]) {
            continue;
        }
        Name above = name;
        above.node = name.node - 1;
        if (std::binary_search(sorted.begin(), sorted.end(), above, less)) {
            continue;
        }
        const NodeId id = known[above.node];
        if (id == none || !find_records(id, name.group, name.span, name.units, any_grid, is_lossy, nullptr)) {
            gap_node = name.node;
            return false;
        }
    }
    return true;
}

WriteSet Index::plan(const Path& path, std::span<const Name> names, bool is_lossy) const {
    WriteSet set;
    std::vector<NodeId> known;
    if (!known_nodes(path, known)) {
        set.status = PlanStatus::wrong_path;
        return set;
    }
    if (!is_gapless(names, known, is_lossy, set.gap_node)) {
        set.status = PlanStatus::gap;
        return set;
    }
    set.new_nodes = static_cast<std::uint32_t>(std::ranges::count(known, none));
    set.is_new_root = nodes_.find(path.root) == none;
    std::vector<RecordId> found;
    for (const Name& name : names) {
        const GridId grid = name.grid == Digest{} ? any_grid : grids_.find(name.grid);
        found.clear();
        if (known[name.node] == none ||
            !find_records(known[name.node], name.group, name.span, name.units, grid, is_lossy, &found)) {
            set.missing.push_back({name.node, name.group, name.span, name.units, {}, name.grid, 0});
        }
        for (const RecordId record : found) {
            set.held.push_back(row_of(record, name.node));
        }
    }
    return set;
}

void Index::make_nodes(WriteSet& set, const Path& path, const std::string& salt) {
    const std::uint32_t count = path.size();
    set.nodes.reserve(count);
    nodes_.reserve(std::size_t{set.new_nodes} + 1, path.tail_ids.size());
    while (keeps_salt_orders_ && salt_links_.size() < nodes_.id_count() + set.new_nodes + 1) {
        salt_links_.append({});
    }
    NodeId parent = nodes_.find(path.root);
    if (parent == none) {
        parent = nodes_.add_root(path.root, use_salt(salt));
    }
    const NodeId root = parent;
    std::uint32_t made = 0;
    try {
        for (std::uint32_t number = 0; number < count; ++number) {
            NodeId id = nodes_.find(path.key(number));
            if (id == none) {
                id = path.is_tail(number)
                         ? nodes_.add_tail(path.key(number), parent, path.end_tokens(number), path.tail_ids)
                         : nodes_.add(path.key(number), parent, path.end_tokens(number));
                ++made;
                ++owner(id).nodes;
            }
            no_ghost(id);
            ++nodes_[id].reserved;
            set.nodes.push_back(id);
            parent = id;
        }
    } catch (...) {
        release_nodes(set.nodes, made);
        set.nodes.clear();
        if (nodes_.is_live(root) && nodes_.is_leaf(root)) {  // else it went with its last node, or others use it
            drop_salt_root(nodes_[root].root);
            nodes_.detach(root);
            nodes_.recycle(root);
        }
        throw;
    }
}

void Index::enter(WriteSet& set, const Path& path, const std::string& salt, std::vector<NodeId> basis_tail,
                  std::vector<std::uint32_t> resume_nodes) {
    records_.reserve(set.missing.size());
    try {
        use_grids(set);
        make_nodes(set, path, salt);
    } catch (...) {
        drop_grids(set);
        throw;
    }
    set.basis_tail = std::move(basis_tail);
    set.resume_nodes = std::move(resume_nodes);
    set_pending(set, true);
    rely(set);
}

void Index::use_grids(WriteSet& set) {
    std::unordered_set<GridId> used;
    for (const Row& row : set.missing) {
        reserve_one(set.grids);
        const GridId grid = grids_.use(row.grid);
        bool is_fresh = false;
        try {
            is_fresh = grid != unknown_grid && used.insert(grid).second;
        } catch (...) {
            grids_.drop(grid);
            throw;
        }
        if (!is_fresh) {
            grids_.drop(grid);
        } else {
            set.grids.push_back(grid);
            ++grid_holds_;
        }
    }
}

void Index::drop_grids(WriteSet& set) {
    for (const GridId grid : set.grids) {
        grids_.drop(grid);
        --grid_holds_;
    }
    set.grids.clear();
}

void Index::undo(WriteSet& set) {
    drop_grids(set);
    set_pending(set, false);
    stop_relying(set);
    release_nodes(set.nodes, set.new_nodes);
    lives_.wake();
    for (const NodeId id : set.basis_tail) {
        recycle_if_unused(id);
    }
}

void Index::set_pending(const WriteSet& set, bool is_on) {
    for (const std::uint32_t number : set.resume_nodes) {
        const NodeId id = set.nodes[number];
        nodes_[id].pending += is_on ? 1U : ~0U;
        mark(id, is_pending, nodes_[id].pending != 0);
    }
}

void Index::rely(const WriteSet& set) {
    for (const std::vector<NodeId>* nodes : {&set.nodes, &set.basis_tail}) {
        for (const NodeId id : *nodes) {
            ++nodes_[id].attention_holds;
            ++nodes_[id].state_holds;
        }
    }
}

void Index::stop_relying(const WriteSet& set) {
    for (const std::vector<NodeId>* nodes : {&set.nodes, &set.basis_tail}) {
        for (const NodeId id : *nodes) {
            --nodes_[id].attention_holds;
            --nodes_[id].state_holds;
        }
    }
}

void Index::recycle_if_unused(NodeId id) {
    const Node& node = nodes_[id];
    if (nodes_.has(id, is_detached) && node.attention_holds == 0 && node.state_holds == 0) {
        nodes_.recycle(id);
    }
}

// A writer no longer needs these nodes to be there. The last `made` of them were made for nothing: they leave no ghosts.
void Index::release_nodes(const std::vector<NodeId>& nodes, std::uint32_t made) {
    for (std::size_t number = nodes.size(); number-- > 0;) {
        const NodeId id = nodes[number];
        --nodes_[id].reserved;
        if (number + made >= nodes.size() && !holds_records(id) && nodes_[id].reserved == 0 && nodes_.is_leaf(id)) {
            forget(id);
        } else {
            retire(id);
        }
    }
}

bool Index::is_reachable(NodeId id, const Row& row, bool is_lossy) const {
    const NodeId parent = nodes_.parent(id);
    // States need not wait for their attention: another worker of the same prompt may bring it later.
    return is_state_group_[row.group] || nodes_.has(parent, is_root) ||
           find_records(parent, row.group, row.span, row.units, any_grid, is_lossy, nullptr);
}

std::vector<std::uint32_t> Index::commit(const WriteSet& set, std::span<const std::uint64_t> ready,
                                         std::span<const std::uint64_t> costs_us, Residency residency, Life life) {
    std::vector<std::uint32_t> order(ready.size());
    for (std::uint32_t number = 0; number < order.size(); ++number) {
        order[number] = number;
    }
    // Ancestors first: a block is reachable only through the one before it.
    std::stable_sort(order.begin(), order.end(), [&](std::uint32_t left, std::uint32_t right) {
        return set.missing[ready[left]].node < set.missing[ready[right]].node;
    });
    // Whatever needs memory comes first: half a commit would leave records whose slots are given back.
    records_.reserve(ready.size());
    std::vector<std::uint32_t> given_back;
    given_back.reserve(ready.size());
    std::vector<Handle> changed;
    changed.reserve(ready.size());
    std::size_t words = 0;
    for (const std::uint64_t index : ready) {
        words = std::max<std::size_t>(words, set.missing[index].units.stop / 64U + 1U);
    }
    lacking_.reserve(words);
    if (life.ends_at != lasting) {
        lives_.reserve(nodes_, ready.size() + life.nodes + set.resume_nodes.size());
    }
    if (!keeps_order_) {
        events_.reserve(events_.size() + 2 * ready.size() + set.nodes.size() + 1);
    }
    const std::size_t noted = changes_.size();
    if (is_watched_) {
        changes_.reserve(noted + ready.size());
    }
    for (const std::uint32_t number : order) {
        const auto index = static_cast<std::uint32_t>(ready[number]);
        const Row& row = set.missing[index];
        const NodeId id = set.nodes[row.node];
        const GridId grid = row.grid == Digest{} ? any_grid : grids_.find(row.grid);
        if (find_records(id, row.group, row.span, row.units, grid, residency.is_lossy, nullptr) ||
            !is_reachable(id, row, residency.is_lossy)) {
            given_back.push_back(index);
            continue;
        }
        const Handle handle = handle_of(id, is_state_group_[row.group]);
        const bool is_first = !nodes_.has(id, is_state_group_[row.group] ? has_states : has_attention);
        add_record(id, row, costs_us[number], residency);
        if (is_first) {
            lives_.set(nodes_, handle, life.ends_at);
        }
        const auto latest = changed.size() > 2 ? changed.end() - 2 : changed.begin();  // a node has two at most
        const auto known = std::find(latest, changed.end(), handle);
        const std::size_t place = noted + static_cast<std::size_t>(known - changed.begin());
        if (known == changed.end()) {
            changed.push_back(handle);
            if (is_watched_) {
                note(id, kind_of(handle) != 0, 0, true);
            }
        }
        if (is_watched_) {
            changes_[place].size_bytes += row.slot.size_bytes;
        }
    }
    for (const Handle handle : changed) {
        refresh(node_of(handle), kind_of(handle) != 0);
    }
    // From the deepest up: an ancestor, committed earlier, must never be ranked before what depends on it.
    if (!order.empty()) {
        touch(std::span(set.nodes).first(set.missing[ready[order.back()]].node + 1));
    }
    live_on(set, life);
    return given_back;
}

RecordId Index::add_record(NodeId id, const Row& row, std::uint64_t cost_us, Residency residency) {
    const GridId grid = grids_.use(row.grid);
    const Record record{.slot_index = row.slot.index,
                        .slot_generation = row.slot.generation,
                        .cost_us = cost_us,
                        .slot_bytes = row.slot.size_bytes,
                        .grid = grid,
                        .next = none,
                        .span = row.span,
                        .units = row.units,
                        .group = static_cast<std::uint8_t>(row.group),
                        .tier = residency.tier,
                        .codec = residency.codec,
                        .is_lossy = residency.is_lossy};
    const RecordId added = records_.add(record);
    RecordId* link = &nodes_[id].first_record;
    while (*link != none && records_[*link].order() <= record.order()) {
        link = &records_[*link].next;
    }
    records_[added].next = *link;
    *link = added;
    nodes_.set(id, is_state_group_[row.group] ? has_states | had_states : has_attention);
    committed_bytes_ += row.slot.size_bytes;
    owner(id).bytes += row.slot.size_bytes;
    ++owner(id).records;
    return added;
}

void Index::leave(WriteSet& set) {
    drop_grids(set);
    set_pending(set, false);
    release_nodes(set.nodes, 0);
    lives_.wake();
}

std::vector<Slot> Index::let_go(WriteSet& set) {
    std::vector<Slot> freed;
    // Tails that came for a hand-over, which may have been taken while this writer relied on them.
    std::vector<NodeId> tails = set.basis_tail;
    tails.push_back(set.nodes.back());
    std::vector<Handle> handles;
    for (const NodeId id : tails) {
        handles.insert(handles.end(), {handle_of(id, true), handle_of(id, false)});
    }
    reserve_removal(handles, freed);
    stop_relying(set);
    for (const NodeId id : tails) {
        drop_if_over(id, freed);
    }
    for (const std::vector<NodeId>* nodes : {&set.nodes, &set.basis_tail}) {
        for (const NodeId id : *nodes) {
            recycle_if_unused(id);
        }
    }
    return freed;
}

// A tail that came for a hand-over goes once that was taken and nobody reads it or builds on it.
void Index::drop_if_over(NodeId id, std::vector<Slot>& freed) {
    if (!nodes_.has(id, is_detached) && nodes_.has(id, is_transient) && !nodes_.has(id, has_handover) &&
        nodes_[id].attention_holds == 0) {
        remove(id, true, freed);
        remove(id, false, freed);
    }
}

}  // namespace kvstore::index
