// The read side: how much of a prompt is there, and collecting it.
#include <algorithm>
#include <array>

#include "index.h"

namespace kvstore::index {

NodeId Index::find(const Digest& key) const {
    const NodeId id = nodes_.find(key);
    return id != none && nodes_.has(id, is_root) ? none : id;
}

NodeId Index::node_at(const Path& path, std::uint32_t blocks) const {
    const NodeId id = find(path.keys[blocks - 1]);
    return id != none && nodes_[id].end_tokens == blocks * path.block_tokens ? id : none;
}

// How many of the first `whole` blocks have nodes: a node's ancestors exist, so this is a binary search.
std::uint32_t Index::deepest_known(const Path& path, std::uint32_t whole) const {
    if (whole == 0 || node_at(path, 1) == none) {
        return 0;
    }
    if (node_at(path, whole) != none) {
        return whole;
    }
    std::uint32_t low = 1;
    std::uint32_t high = whole - 1;
    while (low < high) {
        const std::uint32_t middle = (low + high + 1) / 2;
        if (node_at(path, middle) != none) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Whole blocks from the root whose attention is there without a gap, of `known` blocks that have nodes.
std::uint32_t Index::attention_reach(const Query& query, std::uint32_t known) const {
    if (known == 0) {
        return 0;
    }
    if (query.grid != nullptr) {
        scratch_.resize(known);
        NodeId id = node_at(query.path, known);
        for (std::uint32_t blocks = known; blocks > 0; --blocks) {
            scratch_[blocks - 1] = id;
            id = nodes_.parent(id);
        }
        for (std::uint32_t blocks = 0; blocks < known; ++blocks) {
            const Digest* digest = query.grid->closing((blocks + 1) * query.path.block_tokens);
            if (digest == nullptr || !has_all(scratch_[blocks], *query.needs, false, grids_.find(*digest))) {
                return blocks;
            }
        }
        return known;
    }
    // Contiguity makes "blocks 1 to n are there" monotone in n. Mostly the deepest known block is there.
    const auto is_there = [&](std::uint32_t blocks) {
        return has_all(node_at(query.path, blocks), *query.needs, false, any_grid);
    };
    if (is_there(known)) {
        return known;
    }
    std::uint32_t low = 0;
    std::uint32_t high = known - 1;
    while (low < high) {
        const std::uint32_t middle = (low + high + 1) / 2;
        if (is_there(middle)) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

bool Index::is_resume_point(const Query& query, NodeId id, bool with_attention) const {
    GridId grid = any_grid;
    if (query.grid != nullptr) {
        if (!query.grid->has(nodes_[id].end_tokens)) {
            return false;
        }
        grid = grids_.find(*query.grid->closing(nodes_[id].end_tokens));
    }
    if (query.needs->groups.empty() || (with_attention && !has_all(id, *query.needs, false, grid))) {
        return false;
    }
    return !query.needs->states || has_all(id, *query.needs, true, grid);
}

// Whether other prompts left the path here, even if only ghosts remember them.
bool Index::others_go_on(const Path& path, NodeId id, std::uint32_t blocks, bool is_deepest) const {
    if (!is_deepest || nodes_[id].degree != 1) {
        return nodes_.has(id, forks);
    }
    const Digest* own = blocks < path.blocks ? &path.keys[blocks] : path.tail_key;
    if (own == nullptr) {
        return true;
    }
    const NodeId next = find(*own);
    return next == none || nodes_.parent(next) != id;
}

Found Index::match(const Query& query) const {
    const Path& path = query.path;
    const Needs& needs = *query.needs;
    Found found;
    const std::uint32_t whole = std::min(path.blocks, query.cap_tokens / path.block_tokens);
    const std::uint32_t known = deepest_known(path, whole);
    const std::uint32_t reach = needs.attention ? attention_reach(query, known) : whole;
    found.attention_tokens = reach * path.block_tokens;
    if (needs.attention && reach < known) {
        const NodeId next = node_at(path, reach + 1);
        found.is_other_grid = query.grid != nullptr && has_all(next, needs, false, any_grid);
        found.is_other_shard = !found.is_other_grid && nodes_.has(next, has_attention);
        found.evicted_attention_tokens = nodes_.has(next, is_ghost) ? (reach + 1) * path.block_tokens : 0;
    }
    const NodeId root = nodes_.find(path.root);
    NodeId id = known != 0 ? node_at(path, known) : root;
    std::vector<NodeId> tails;
    for (std::uint32_t blocks = known; id != none && found.candidates.size() < query.candidates_max; --blocks) {
        const Step step = nodes_.step(id);
        if ((step.flags & has_tails) != 0) {
            const std::size_t start = std::size_t{blocks} * path.block_tokens;
            const auto rest = query.token_ids.subspan(std::min(start, query.token_ids.size()));
            tails.clear();
            nodes_.matching_tails(id, rest.first(std::min<std::size_t>(rest.size(), path.block_tokens - 1U)),
                                  query.cap_tokens, tails);
            for (const NodeId tail : tails) {
                if (std::find(query.excluded.begin(), query.excluded.end(), tail) != query.excluded.end()) {
                    continue;
                }
                const Candidate candidate{blocks, tail, nodes_[tail].end_tokens};
                found.tails.push_back(candidate);
                if (found.candidates.empty() && found.pending_tokens == 0 && nodes_.has(tail, is_pending)) {
                    found.pending_tokens = candidate.tokens;
                }
                if (blocks <= reach && is_resume_point(query, tail, true)) {
                    found.candidates.push_back(candidate);
                }
            }
        }
        if (blocks == 0) {
            break;
        }
        const std::uint32_t end_tokens = blocks * path.block_tokens;
        const bool is_first = found.candidates.empty();
        if (is_first && found.pending_tokens == 0 && (step.flags & is_pending) != 0) {
            found.pending_tokens = end_tokens;
        }
        if (blocks <= reach && ((step.flags & (has_states | had_states)) != 0 || !needs.states)) {
            if (is_resume_point(query, id, false)) {
                found.candidates.push_back({blocks, none, end_tokens});
            } else if (is_first) {
                std::uint32_t& why =
                    (step.flags & has_states) != 0 ? found.foreign_state_tokens : found.evicted_state_tokens;
                if (why == 0 && (step.flags & (has_states | had_states)) != 0) {
                    why = end_tokens;
                }
            }
        }
        if (others_go_on(path, id, blocks, blocks == known)) {
            found.branch_points.push_back(end_tokens);
        }
        // Ids of one chain are mostly consecutive: a guess that the processor can go on with before it has loaded.
        id = step.parent == id - 1 ? id - 1 : step.parent;
    }
    std::reverse(found.branch_points.begin(), found.branch_points.end());
    if (!found.candidates.empty() && found.pending_tokens <= found.candidates.front().tokens) {
        found.pending_tokens = 0;
    }
    return found;
}

std::optional<Held> Index::collect(const Path& path, const Needs& needs, const Grid* grid,
                                   const std::vector<PlaceGrid>* places) const {
    const std::uint32_t count = path.size();
    if (count == 0) {
        return std::nullopt;
    }
    Held held;
    held.nodes.resize(count);
    NodeId id = nodes_.find(path.key(count - 1));
    for (std::uint32_t number = count; number-- > 0; id = nodes_.parent(id)) {
        if (id == none || nodes_.has(id, is_root) || !(nodes_.key(id) == path.key(number)) ||
            nodes_[id].end_tokens != path.end_tokens(number)) {
            return std::nullopt;
        }
        held.nodes[number] = id;
    }
    if (!(nodes_.key(id) == path.root)) {
        return std::nullopt;
    }
    const auto wanted = [&](std::uint32_t number, const GroupNeed& need, std::uint16_t span) {
        if (places != nullptr) {
            const auto place = std::tuple(number, std::uint16_t{need.group}, span);
            const auto at = std::lower_bound(places->begin(), places->end(), place,
                                             [](const PlaceGrid& left, const auto& right) { return left.place() < right; });
            return at == places->end() || at->place() != place ? any_grid : grids_.find(at->digest);
        }
        if (grid == nullptr) {
            return any_grid;
        }
        const Digest* digest = grid->closing(path.end_tokens(number));
        return digest == nullptr ? unknown_grid : grids_.find(*digest);
    };
    std::vector<RecordId> chosen;
    for (const GroupNeed& need : needs.groups) {
        for (std::uint16_t span = 0; span < need.spans; ++span) {
            for (std::uint32_t number = need.is_state ? count - 1 : 0; number < count; ++number) {
                RecordId at = nodes_[held.nodes[number]].first_record;
                chosen.clear();
                if (!cover_span(at, need, span, wanted(number, need, span), needs.accepts_lossy, &chosen)) {
                    return std::nullopt;
                }
                std::sort(chosen.begin(), chosen.end(), [&](RecordId left, RecordId right) {
                    const Units a = records_[left].units;
                    const Units b = records_[right].units;
                    return std::pair(a.start, a.stop) < std::pair(b.start, b.stop);
                });
                for (const RecordId record : chosen) {
                    held.rows.push_back(row_of(record, number));
                }
            }
        }
    }
    return held;
}

void Index::hold(const Held& held) {
    if (!keeps_order_) {
        events_.reserve(events_.size() + held.nodes.size() + 1);
    }
    for (const NodeId id : held.nodes) {
        ++nodes_[id].attention_holds;
    }
    ++nodes_[held.nodes.back()].state_holds;
    touch(held.nodes);
}

void Index::touch_path(const Path& path) {
    std::vector<NodeId> nodes;
    nodes.reserve(path.size());
    for (std::uint32_t number = 0; number < path.size(); ++number) {
        const NodeId id = find(path.key(number));
        if (id == none) {
            break;
        }
        nodes.push_back(id);
    }
    if (!keeps_order_) {
        events_.reserve(events_.size() + nodes.size() + 1);
    }
    touch(nodes);
}

std::vector<Slot> Index::release(const Held& held) {
    std::vector<Slot> freed;
    const NodeId last = held.nodes.back();
    reserve_removal(std::array{handle_of(last, true), handle_of(last, false)}, freed);
    for (const NodeId id : held.nodes) {
        --nodes_[id].attention_holds;
    }
    --nodes_[last].state_holds;
    drop_if_over(last, freed);
    for (const NodeId id : held.nodes) {
        recycle_if_unused(id);
    }
    return freed;
}

bool Index::is_there(const Path& path, const Name& name, bool is_lossy) const {
    const NodeId id = find(path.key(name.node));
    if (id == none) {
        return false;
    }
    const GridId grid = name.grid == Digest{} ? any_grid : grids_.find(name.grid);
    return find_records(id, name.group, name.span, name.units, grid, is_lossy, nullptr);
}

}  // namespace kvstore::index
