// The prefix nodes and how they hang together: keys, parents, children, tails. Nothing of what they are used for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "chunked.h"
#include "digest_hash.h"
#include "id_table.h"
#include "types.h"

namespace kvstore::index {

enum Flag : std::uint32_t {
    is_root = 1U << 0,        // where chains of one salt and adapter begin; no prefix
    is_tail = 1U << 1,        // ends inside a block
    has_attention = 1U << 2,  // records of attention groups
    has_states = 1U << 3,     // records of state groups
    had_states = 1U << 4,     // states were here once: "evicted" rather than "never stored"
    is_pending = 1U << 5,     // a running writer will make this a resume point
    is_ghost = 1U << 6,       // no records, and nobody about to write any
    is_idle = 1U << 7,        // a ghost that nothing hangs on
    is_transient = 1U << 8,   // a tail that exists for a hand-over only
    has_handover = 1U << 9,   // a hand-over waits here
    is_detached = 1U << 10,   // forgotten, but its id is still held by somebody
    has_tails = 1U << 11,
    forks = 1U << 12,  // more than one child or tail
    // By kind, attention first: ranked for eviction; chosen to be evicted.
    is_ranked = 1U << 13,
    is_chosen = 1U << 15,
    is_pushed = 1U << 17,  // named as a victim by a policy outside, and not used since
    is_timed = 1U << 19,   // ends at some moment
    ends_prompt = 1U << 21,  // somebody wrote a prompt that ends here
    has_end = 1U << 22,      // and such prompts end at some moment
};

// What a match looks at on its way to the root.
struct Step {
    NodeId parent;
    std::uint32_t flags;
};

struct Node {
    NodeId root;  // of a root: the number of its salt
    std::uint32_t end_tokens;
    NodeId first_child;  // of a tail: the number of its token ids
    NodeId first_tail;
    NodeId next;         // siblings, children and tails apart
    NodeId previous;
    std::uint32_t degree;  // children and tails
    RecordId first_record;
    std::uint32_t attention_holds;
    std::uint32_t state_holds;
    std::uint32_t pending;
    std::uint32_t reserved;
    // Neighbours in an order of use: of the attention, of the states. An idle ghost has its place among ghosts instead.
    NodeId earlier[2];
    NodeId later[2];
};

class Nodes {
  public:
    explicit Nodes(std::uint64_t seed) : hash_(seed) {}

    // Bytes of one node: its parts, and its share of the table when that is as empty as it gets.
    static constexpr std::size_t node_bytes = sizeof(Step) + sizeof(Node) + sizeof(Digest) + 24;

    Node& operator[](NodeId id) { return nodes_[id]; }
    const Node& operator[](NodeId id) const { return nodes_[id]; }
    const Digest& key(NodeId id) const { return keys_[id]; }
    const Step& step(NodeId id) const { return steps_[id]; }
    NodeId parent(NodeId id) const { return steps_[id].parent; }
    bool has(NodeId id, std::uint32_t flags) const { return (steps_[id].flags & flags) != 0; }
    void set(NodeId id, std::uint32_t flags) { steps_[id].flags |= flags; }
    void clear(NodeId id, std::uint32_t flags) { steps_[id].flags &= ~flags; }

    // The node or root of a key, or `none`.
    NodeId find(const Digest& key) const {
        return table_.find(hash(key), [&](NodeId id) { return keys_[id] == key; });
    }
    void prefetch(const Digest& key) const { table_.prefetch(hash(key)); }
    std::uint32_t hash(const Digest& key) const { return fold(hash_(key)); }

    // Ids that were ever given out, those that are free again included.
    std::uint32_t id_count() const { return steps_.size(); }
    std::uint32_t prefix_count() const { return prefixes_; }
    std::uint32_t root_count() const { return roots_; }
    std::uint32_t detached_count() const { return detached_; }
    std::size_t tail_ids_bytes() const { return tail_ids_bytes_; }
    std::size_t allocated_bytes() const;

    NodeId add_root(const Digest& key, std::uint32_t salt);
    NodeId add(const Digest& key, NodeId parent, std::uint32_t end_tokens);
    NodeId add_tail(const Digest& key, NodeId parent, std::uint32_t end_tokens, std::span<const std::uint32_t> ids);
    // Afterwards adding this many nodes, the last a tail of `tail_tokens`, throws nothing.
    void reserve(std::size_t count, std::size_t tail_tokens);

    // Take a node without children out of the tree. Its id stays taken until `recycle`.
    void detach(NodeId id);
    void recycle(NodeId id);

    // Whether an id is in use: in the tree, or detached and held.
    bool is_live(NodeId id) const { return id < steps_.size() && steps_[id].parent != id; }
    bool is_leaf(NodeId id) const { return nodes_[id].degree == 0; }
    NodeId first_child(NodeId id) const { return has(id, is_tail) ? none : nodes_[id].first_child; }
    NodeId first_tail(NodeId id) const { return nodes_[id].first_tail; }
    std::span<const std::uint32_t> tail_ids(NodeId tail) const { return tail_ids_[nodes_[tail].first_child]; }

    // Everything below a node, children before their parents, appended to `found`; but not what `skip` holds for,
    // nor anything below that.
    template <typename Skip>
    void below(NodeId id, std::vector<NodeId>& found, Skip skip) const {
        const std::size_t begin = found.size();
        const auto add = [&](NodeId head) {
            for (NodeId child = head; child != none; child = nodes_[child].next) {
                if (!skip(child)) {
                    found.push_back(child);
                }
            }
        };
        for (std::size_t at = begin;; id = found[at++]) {  // parents first, then turned around
            add(nodes_[id].first_tail);
            add(first_child(id));
            if (at == found.size()) {
                break;
            }
        }
        std::reverse(found.begin() + static_cast<std::ptrdiff_t>(begin), found.end());
    }

    // Tails of `parent` whose ids `ids` begins with, and which end at `cap_tokens` at the latest; deepest first.
    void matching_tails(NodeId parent, std::span<const std::uint32_t> ids, std::uint32_t cap_tokens,
                        std::vector<NodeId>& found) const;

    // What is wrong with the tree or the tables; nullptr when nothing is.
    const char* check() const;

    template <typename Visit>
    void each(Visit visit) const {
        for (NodeId id = 0; id < steps_.size(); ++id) {
            if (is_live(id)) {
                visit(id);
            }
        }
    }

  private:
    static std::uint32_t fold(std::uint64_t word) { return static_cast<std::uint32_t>(word >> 32); }
    std::uint32_t ids_hash(NodeId parent, std::span<const std::uint32_t> ids) const;
    NodeId make(const Digest& key, NodeId parent, std::uint32_t end_tokens, std::uint32_t flags);
    void link(NodeId id);
    NodeId& head_of(NodeId id);

    DigestHash hash_;
    Chunked<Step> steps_;  // a free place is its own parent
    Chunked<Node> nodes_;
    Chunked<Digest> keys_;
    IdTable table_;
    IdTable tails_by_ids_;
    std::vector<std::vector<std::uint32_t>> tail_ids_;
    std::vector<std::uint32_t> free_tail_ids_;
    NodeId free_ = none;
    std::uint32_t free_count_ = 0;
    std::uint32_t prefixes_ = 0;
    std::uint32_t roots_ = 0;
    std::uint32_t detached_ = 0;
    std::size_t tail_ids_bytes_ = 0;
};

}  // namespace kvstore::index
