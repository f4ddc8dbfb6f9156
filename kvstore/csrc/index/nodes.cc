#include "nodes.h"

#include <algorithm>

namespace kvstore::index {

std::size_t Nodes::allocated_bytes() const {
    return steps_.allocated_bytes() + nodes_.allocated_bytes() + keys_.allocated_bytes() + table_.allocated_bytes() +
           tails_by_ids_.allocated_bytes() + tail_ids_bytes_;
}

std::uint32_t Nodes::ids_hash(NodeId parent, std::span<const std::uint32_t> ids) const {
    std::uint64_t state = hash_.begin(parent);
    for (const std::uint32_t id : ids) {
        state = hash_.next(state, id);
    }
    return fold(state);
}

NodeId Nodes::make(const Digest& key, NodeId parent, std::uint32_t end_tokens, std::uint32_t flags) {
    reserve(1, 0);
    NodeId id = free_;
    if (id != none) {
        free_ = nodes_[id].next;
        --free_count_;
    } else {
        id = steps_.append({});
        nodes_.append({});
        keys_.append({});
    }
    steps_[id] = {parent, flags};
    keys_[id] = key;
    nodes_[id] = Node{.root = none,
                      .end_tokens = end_tokens,
                      .first_child = none,
                      .first_tail = none,
                      .next = none,
                      .previous = none,
                      .degree = 0,
                      .first_record = none,
                      .attention_holds = 0,
                      .state_holds = 0,
                      .pending = 0,
                      .reserved = 0,
                      .earlier = {none, none},
                      .later = {none, none}};
    table_.insert(hash(key), id);
    return id;
}

void Nodes::reserve(std::size_t count, std::size_t tail_tokens) {
    const std::size_t fresh = count > free_count_ ? count - free_count_ : 0;
    steps_.reserve(steps_.size() + fresh);
    nodes_.reserve(nodes_.size() + fresh);
    keys_.reserve(keys_.size() + fresh);
    table_.reserve(table_.size() + count);
    if (tail_tokens != 0) {
        tails_by_ids_.reserve(tails_by_ids_.size() + 1);
        reserve_one(tail_ids_);
        // Freeing a tail notes its number, and must not have to allocate for that.
        free_tail_ids_.reserve(tail_ids_.capacity());
    }
}

NodeId Nodes::add_root(const Digest& key, std::uint32_t salt) {
    const NodeId id = make(key, none, 0, is_root);
    nodes_[id].root = salt;
    ++roots_;
    return id;
}

NodeId Nodes::add(const Digest& key, NodeId parent, std::uint32_t end_tokens) {
    const NodeId id = make(key, parent, end_tokens, 0);
    link(id);
    ++prefixes_;
    return id;
}

NodeId Nodes::add_tail(const Digest& key, NodeId parent, std::uint32_t end_tokens,
                       std::span<const std::uint32_t> ids) {
    reserve(1, ids.size());
    std::vector<std::uint32_t> kept(ids.begin(), ids.end());
    const NodeId id = make(key, parent, end_tokens, is_tail);
    std::uint32_t number = static_cast<std::uint32_t>(tail_ids_.size());
    if (free_tail_ids_.empty()) {
        tail_ids_.push_back(std::move(kept));
    } else {
        number = free_tail_ids_.back();
        free_tail_ids_.pop_back();
        tail_ids_[number] = std::move(kept);
    }
    nodes_[id].first_child = number;
    tail_ids_bytes_ += ids.size_bytes();
    tails_by_ids_.insert(ids_hash(parent, ids), id);
    link(id);
    ++prefixes_;
    return id;
}

NodeId& Nodes::head_of(NodeId id) {
    Node& parent = nodes_[steps_[id].parent];
    return has(id, is_tail) ? parent.first_tail : parent.first_child;
}

void Nodes::link(NodeId id) {
    const NodeId parent = steps_[id].parent;
    nodes_[id].root = has(parent, is_root) ? parent : nodes_[parent].root;
    NodeId& head = head_of(id);
    nodes_[id].next = head;
    if (head != none) {
        nodes_[head].previous = id;
    }
    head = id;
    if (has(id, is_tail)) {
        set(parent, has_tails);
    }
    if (++nodes_[parent].degree > 1) {
        set(parent, forks);
    }
}

void Nodes::detach(NodeId id) {
    table_.erase(hash(keys_[id]), id);
    set(id, is_detached);
    ++detached_;
    if (has(id, is_root)) {
        --roots_;
        return;
    }
    --prefixes_;
    const NodeId parent = steps_[id].parent;
    if (has(id, is_tail)) {
        const std::uint32_t number = nodes_[id].first_child;
        tails_by_ids_.erase(ids_hash(parent, tail_ids_[number]), id);
        tail_ids_bytes_ -= tail_ids_[number].size() * sizeof(std::uint32_t);
        tail_ids_[number] = {};
        free_tail_ids_.push_back(number);
    }
    const NodeId next = nodes_[id].next;
    const NodeId previous = nodes_[id].previous;
    (previous != none ? nodes_[previous].next : head_of(id)) = next;
    if (next != none) {
        nodes_[next].previous = previous;
    }
    if (nodes_[parent].first_tail == none) {
        clear(parent, has_tails);
    }
    if (--nodes_[parent].degree <= 1) {
        clear(parent, forks);
    }
    steps_[id].parent = none;
}

void Nodes::recycle(NodeId id) {
    --detached_;
    steps_[id] = {id, 0};
    nodes_[id].next = free_;
    free_ = id;
    ++free_count_;
}

void Nodes::matching_tails(NodeId parent, std::span<const std::uint32_t> ids, std::uint32_t cap_tokens,
                           std::vector<NodeId>& found) const {
    const std::uint32_t start = nodes_[parent].end_tokens;
    if (cap_tokens <= start) {
        return;
    }
    const std::size_t begin = found.size();
    const std::span<const std::uint32_t> usable = ids.first(std::min<std::size_t>(ids.size(), cap_tokens - start));
    const auto continues = [&](NodeId tail) {
        const std::span<const std::uint32_t> own = tail_ids(tail);
        return own.size() <= usable.size() && std::equal(own.begin(), own.end(), usable.begin());
    };
    // Some are compared one by one; where many hang on one node, the prompt's own ids say where to look.
    constexpr int few = 16;
    int compared = 0;
    NodeId tail = nodes_[parent].first_tail;
    for (; tail != none && compared < few; tail = nodes_[tail].next, ++compared) {
        if (continues(tail)) {
            found.push_back(tail);
        }
    }
    if (tail != none) {
        found.resize(begin);
        std::uint64_t state = hash_.begin(parent);
        for (std::size_t length = 1; length <= usable.size(); ++length) {
            state = hash_.next(state, usable[length - 1]);
            tails_by_ids_.find(fold(state), [&](NodeId id) {
                if (parent == this->parent(id) && tail_ids(id).size() == length && continues(id)) {
                    found.push_back(id);
                }
                return false;  // extra inputs may tell several of the same ids apart
            });
        }
    }
    std::sort(found.begin() + static_cast<std::ptrdiff_t>(begin), found.end(), [&](NodeId left, NodeId right) {
        return nodes_[left].end_tokens > nodes_[right].end_tokens;
    });
}

const char* Nodes::check() const {
    const char* wrong = nullptr;
    std::uint32_t prefixes = 0;
    std::uint32_t roots = 0;
    std::uint32_t detached = 0;
    std::uint32_t tails = 0;
    std::size_t tail_bytes = 0;
    each([&](NodeId id) {
        const Node& node = nodes_[id];
        if (has(id, is_detached)) {
            ++detached;
            return;
        }
        if (find(keys_[id]) != id) {
            wrong = "the table does not lead to a node's key";
        }
        std::uint32_t degree = 0;
        for (const NodeId head : {first_child(id), node.first_tail}) {
            NodeId previous = none;
            for (NodeId child = head; child != none; previous = child, child = nodes_[child].next, ++degree) {
                if (steps_[child].parent != id || nodes_[child].previous != previous || has(child, is_detached) ||
                    has(child, is_tail) != (head == node.first_tail) || nodes_[child].end_tokens <= node.end_tokens) {
                    wrong = "a node is not where its parent looks for it";
                }
            }
        }
        if (degree != node.degree || has(id, forks) != (degree > 1) || has(id, has_tails) != (node.first_tail != none)) {
            wrong = "a node miscounts what hangs on it";
        }
        if (has(id, is_root)) {
            ++roots;
            if (degree == 0) {
                wrong = "a root outlived its nodes";
            }
            return;
        }
        ++prefixes;
        const NodeId parent = steps_[id].parent;
        if (has(parent, is_detached) || node.root != (has(parent, is_root) ? parent : nodes_[parent].root)) {
            wrong = "a node hangs in the air";
        }
        if (has(id, is_tail)) {
            ++tails;
            tail_bytes += tail_ids(id).size_bytes();
            if (tail_ids(id).size() != node.end_tokens - nodes_[parent].end_tokens) {
                wrong = "a tail has ids of another length";
            }
        }
    });
    if (prefixes != prefixes_ || roots != roots_ || detached != detached_ || tail_bytes != tail_ids_bytes_ ||
        table_.size() != prefixes + roots || tails_by_ids_.size() != tails) {
        return "nodes are miscounted";
    }
    return wrong;
}

}  // namespace kvstore::index
