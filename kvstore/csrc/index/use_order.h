// Evictables in the order of their last use, and idle ghosts in that of their becoming so: lists through the nodes.
#pragma once

#include <cstdint>

#include "nodes.h"

namespace kvstore::index {

// What is evicted in one piece: the attention of a node (even) or its states (odd).
using Handle = std::uint32_t;

constexpr Handle handle_of(NodeId node, bool states) { return node * 2 + (states ? 1 : 0); }
constexpr NodeId node_of(Handle handle) { return handle / 2; }
constexpr unsigned kind_of(Handle handle) { return handle & 1; }

// The neighbours of a node's evictables in an order other than the one in the node itself.
struct OrderLinks {
    NodeId earlier[2];
    NodeId later[2];
};

// `Links` has the neighbours by node: `Nodes`, or an array of `OrderLinks`.
class UseOrder {
  public:
    Handle oldest() const { return oldest_; }
    template <typename Links>
    Handle later(const Links& links, Handle handle) const {
        return links[node_of(handle)].later[kind_of(handle)];
    }
    std::uint32_t size() const { return size_; }

    template <typename Links>
    void append(Links& links, Handle handle) {
        auto& own = links[node_of(handle)];
        own.earlier[kind_of(handle)] = newest_;
        own.later[kind_of(handle)] = none;
        (newest_ == none ? oldest_ : links[node_of(newest_)].later[kind_of(newest_)]) = handle;
        newest_ = handle;
        ++size_;
    }

    template <typename Links>
    void remove(Links& links, Handle handle) {
        const Handle earlier = links[node_of(handle)].earlier[kind_of(handle)];
        const Handle later = links[node_of(handle)].later[kind_of(handle)];
        (earlier == none ? oldest_ : links[node_of(earlier)].later[kind_of(earlier)]) = later;
        (later == none ? newest_ : links[node_of(later)].earlier[kind_of(later)]) = earlier;
        --size_;
    }

  private:
    Handle oldest_ = none;
    Handle newest_ = none;
    std::uint32_t size_ = 0;
};

}  // namespace kvstore::index
