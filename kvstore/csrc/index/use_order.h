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

class UseOrder {
  public:
    Handle oldest() const { return oldest_; }
    Handle later(const Nodes& nodes, Handle handle) const { return nodes[node_of(handle)].later[kind_of(handle)]; }
    std::uint32_t size() const { return size_; }

    void append(Nodes& nodes, Handle handle) {
        Node& node = nodes[node_of(handle)];
        node.earlier[kind_of(handle)] = newest_;
        node.later[kind_of(handle)] = none;
        (newest_ == none ? oldest_ : nodes[node_of(newest_)].later[kind_of(newest_)]) = handle;
        newest_ = handle;
        ++size_;
    }

    void remove(Nodes& nodes, Handle handle) {
        const Handle earlier = nodes[node_of(handle)].earlier[kind_of(handle)];
        const Handle later = nodes[node_of(handle)].later[kind_of(handle)];
        (earlier == none ? oldest_ : nodes[node_of(earlier)].later[kind_of(earlier)]) = later;
        (later == none ? newest_ : nodes[node_of(later)].earlier[kind_of(later)]) = earlier;
        --size_;
    }

  private:
    Handle oldest_ = none;
    Handle newest_ = none;
    std::uint32_t size_ = 0;
};

}  // namespace kvstore::index
