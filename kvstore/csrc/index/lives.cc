// Time to live: what a write gives its records, what a prompt's may be changed to, and what goes when it is over.
//
// An evictable lives as long as any prompt that was written through it is wanted. So nothing outlives what it hangs on,
// and whatever lies below an evictable that ends has ended as well.
#include <algorithm>

#include "index.h"

namespace kvstore::index {

// A writer has committed the first `life.nodes` of its nodes, by itself or because others had before.
void Index::live_on(const WriteSet& set, Life life) {
    if (lives_.size() != 0) {
        for (std::uint32_t number = 0; number < life.nodes; ++number) {
            lives_.extend(nodes_, handle_of(set.nodes[number], false), life.ends_at);
        }
        for (const std::uint32_t number : set.resume_nodes) {
            if (number < life.nodes) {
                lives_.extend(nodes_, handle_of(set.nodes[number], true), life.ends_at);
            }
        }
    }
    const NodeId last = set.nodes.back();
    if (life.nodes == set.nodes.size() && holds_records(last)) {
        lives_.set_prompts(nodes_, last, std::max(life.ends_at, lives_.of_prompts(nodes_, last)));
    }
    lives_.tidy(nodes_);
}

// The deepest node of a path that has records, and the number of the one after it; 0 without one.
NodeId Index::deepest_of(const Path& path, std::uint32_t& number) const {
    for (number = path.size(); number > 0; --number) {
        const NodeId id = find(path.key(number - 1));
        if (id != none && nodes_[id].end_tokens == path.end_tokens(number - 1) && holds_records(id)) {
            return id;
        }
    }
    return none;
}

std::uint32_t Index::stored_tokens(const Path& path) const {
    std::uint32_t number = 0;
    const NodeId deepest = deepest_of(path, number);
    return deepest == none ? 0 : nodes_[deepest].end_tokens;
}

std::uint32_t Index::set_end(const Path& path, Moment at, std::uint32_t after_tokens, std::uint32_t meant_tokens) {
    std::uint32_t number = 0;
    const NodeId deepest = deepest_of(path, number);
    if (deepest == none) {
        return 0;
    }
    const bool is_meant = meant_tokens == 0 || nodes_[deepest].end_tokens == meant_tokens;
    lives_.reserve(nodes_, 2 * std::size_t{number});
    for (NodeId id = deepest; !nodes_.has(id, is_root); id = nodes_.parent(id)) {
        if (nodes_[id].end_tokens <= after_tokens && !(is_meant && id == deepest)) {
            break;
        }
        if (nodes_.has(id, has_states)) {
            lives_.set(nodes_, handle_of(id, true), at);
        }
        if ((is_meant && id == deepest) || nodes_.has(id, ends_prompt)) {
            lives_.set_prompts(nodes_, id, at);
        }
    }
    for (NodeId id = deepest; !nodes_.has(id, is_root) && nodes_.has(id, has_attention); id = nodes_.parent(id)) {
        const Handle handle = handle_of(id, false);
        const Moment wanted = std::max(at, wanted_until(id));
        if (wanted != lives_.of(nodes_, handle)) {
            lives_.set(nodes_, handle, wanted);
        } else if (nodes_[id].end_tokens <= after_tokens) {
            break;  // and so is all that it hangs on
        }
    }
    lives_.tidy(nodes_);
    return nodes_[deepest].end_tokens;
}

// Until when something hangs on a node's attention, or a prompt ends there.
Moment Index::wanted_until(NodeId id) const {
    Moment wanted = lives_.of_prompts(nodes_, id);
    const auto hangs = [&](NodeId other) {
        for (const bool is_state : {false, true}) {
            if (nodes_.has(other, is_state ? has_states : has_attention)) {
                wanted = std::max(wanted, lives_.of(nodes_, handle_of(other, is_state)));
            }
        }
    };
    if (nodes_.has(id, has_states)) {
        wanted = std::max(wanted, lives_.of(nodes_, handle_of(id, true)));
    }
    for (const NodeId head : {nodes_.first_child(id), nodes_.has(id, is_tail) ? none : nodes_.first_tail(id)}) {
        for (NodeId child = head; child != none && wanted != lasting; child = nodes_[child].next) {
            hangs(child);
        }
    }
    return wanted;
}

std::vector<Slot> Index::expire(Moment now, bool even_written) {
    std::vector<Slot> freed;
    std::vector<Handle> handles;
    for (Handle handle = lives_.first(nodes_, now); handle != none; handle = lives_.first(nodes_, now)) {
        const NodeId id = node_of(handle);
        const bool is_state = kind_of(handle) != 0;
        try {
            if (!is_state && nodes_[id].reserved != 0 && !even_written) {
                lives_.put_off_first();  // a running writer will go on from here
                continue;
            }
            handles.clear();
            if (is_state) {
                handles.push_back(handle);
            } else {
                everything_below(id, handles);
            }
            reserve_one(expired_);
            reserve_removal(handles, freed);
        } catch (...) {
            if (freed.empty()) {
                throw;
            }
            return freed;  // these have gone; the rest is for another time
        }
        lives_.drop_first();
        expired_.push_back({nodes_.key(id), is_state});
        for (const Handle each : handles) {
            remove(node_of(each), kind_of(each) != 0, freed);
        }
    }
    return freed;
}

std::vector<Moment> Index::ends_of(std::span<const Digest> keys) const {
    std::vector<Moment> ends;
    ends.reserve(3 * keys.size());
    for (const Digest& key : keys) {
        const NodeId id = find(key);
        for (const bool is_state : {false, true}) {
            const bool is_there = id != none && nodes_.has(id, is_state ? has_states : has_attention);
            ends.push_back(is_there ? lives_.of(nodes_, handle_of(id, is_state)) : 0);
        }
        ends.push_back(id != none && holds_records(id) ? lives_.of_prompts(nodes_, id) : 0);
    }
    return ends;
}

void Index::prolong(std::span<const Digest> keys, std::span<const Moment> ends) {
    lives_.reserve(nodes_, 2 * keys.size());
    for (std::size_t number = 0; number < keys.size(); ++number) {
        const NodeId id = find(keys[number]);
        if (id == none || nodes_.has(id, is_root) || !holds_records(id)) {
            continue;
        }
        for (const bool is_state : {false, true}) {
            if (nodes_.has(id, is_state ? has_states : has_attention)) {
                lives_.extend(nodes_, handle_of(id, is_state), ends[3 * number + (is_state ? 1 : 0)]);
            }
        }
        const Moment prompts = ends[3 * number + 2];
        if (prompts > lives_.of_prompts(nodes_, id)) {
            lives_.set_prompts(nodes_, id, prompts);
        }
    }
    lives_.tidy(nodes_);
}

void Index::restore_ends(std::span<const Digest> keys, std::span<const Moment> ends) {
    std::vector<NodeId> order;
    nodes_.each([&](NodeId id) {
        if (!nodes_.has(id, is_root)) {
            order.push_back(id);
        }
    });
    std::sort(order.begin(), order.end(),
              [&](NodeId left, NodeId right) { return nodes_[left].end_tokens < nodes_[right].end_tokens; });
    lives_.reserve(nodes_, 2 * (keys.size() + order.size()));
    const auto shorten = [&](NodeId id, bool is_state, Moment at) {
        const Handle handle = handle_of(id, is_state);
        if (nodes_.has(id, is_state ? has_states : has_attention) && at < lives_.of(nodes_, handle)) {
            lives_.set(nodes_, handle, at);
        }
    };
    for (std::size_t number = 0; number < keys.size(); ++number) {
        const NodeId id = find(keys[number]);
        if (id == none || nodes_.has(id, is_root) || !holds_records(id)) {
            continue;
        }
        const Moment* const at = &ends[3 * number];
        shorten(id, false, at[0]);
        shorten(id, true, at[1]);
        if (at[2] != 0) {
            const Moment known = lives_.of_prompts(nodes_, id);
            lives_.set_prompts(nodes_, id, known == 0 ? at[2] : std::min(at[2], known));
        }
    }
    for (const NodeId id : order) {
        const NodeId parent = nodes_.parent(id);
        if (!nodes_.has(parent, is_root) && nodes_.has(parent, has_attention)) {
            shorten(id, false, lives_.of(nodes_, handle_of(parent, false)));
        }
        if (nodes_.has(id, has_attention)) {
            const Moment attention = lives_.of(nodes_, handle_of(id, false));
            shorten(id, true, attention);
            if (lives_.of_prompts(nodes_, id) > attention) {
                lives_.set_prompts(nodes_, id, attention);
            }
        }
    }
    lives_.tidy(nodes_);
}

}  // namespace kvstore::index
