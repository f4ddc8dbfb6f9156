// When evictables end by themselves. An evictable without an end here lasts.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "chunked.h"
#include "use_order.h"

namespace kvstore::index {

// Microseconds of a clock that the pool reads; the index has none.
using Moment = std::uint64_t;

constexpr Moment lasting = ~Moment{0};

class Lives {
  public:
    // What an evictable with an end takes, its stale entries included.
    static constexpr std::size_t life_bytes = 3 * sizeof(Moment) + 2 * (sizeof(Moment) + sizeof(std::uint64_t));

    // How many have an end.
    std::uint32_t size() const { return count_; }
    std::size_t memory_bytes() const { return count_ * life_bytes; }
    std::size_t allocated_bytes() const { return moments_.allocated_bytes() + ends_.capacity() * sizeof(End); }

    Moment of(const Nodes& nodes, Handle handle) const {
        return is_set(nodes, handle) ? moments_[node_of(handle)][kind_of(handle)] : lasting;
    }
    // When something ends, or should be looked at again, at the latest.
    Moment next() const { return is_awake_ ? 0 : ends_.empty() ? lasting : ends_.front().at; }

    // Afterwards so many changes throw nothing.
    void reserve(const Nodes& nodes, std::size_t changes) {
        while (moments_.size() < nodes.id_count()) {
            moments_.append({});
        }
        const std::size_t wanted = ends_.size() + changes;
        if (wanted > ends_.capacity()) {
            ends_.reserve(std::max(wanted, 2 * ends_.capacity()));
        }
    }

    void set(Nodes& nodes, Handle handle, Moment at) {
        if (at == lasting) {
            clear(nodes, handle);
            return;
        }
        if (!is_set(nodes, handle)) {
            nodes.set(node_of(handle), is_timed << kind_of(handle));
            ++count_;
        }
        moments_[node_of(handle)][kind_of(handle)] = at;
        push({at, handle});
    }
    // Only to a later moment.
    void extend(Nodes& nodes, Handle handle, Moment at) {
        if (at > of(nodes, handle)) {
            set(nodes, handle, at);
        }
    }

    void clear(Nodes& nodes, Handle handle) {
        if (is_set(nodes, handle)) {
            nodes.clear(node_of(handle), is_timed << kind_of(handle));
            --count_;
        }
    }

    // Until when the prompts that end at a node are wanted; 0 if none does.
    Moment of_prompts(const Nodes& nodes, NodeId id) const {
        return !nodes.has(id, ends_prompt) ? 0 : nodes.has(id, has_end) ? moments_[id][2] : lasting;
    }
    void set_prompts(Nodes& nodes, NodeId id, Moment at) {
        nodes.set(id, ends_prompt);
        nodes.clear(id, has_end);
        if (at != lasting) {
            nodes.set(id, has_end);
            moments_[id][2] = at;
        }
    }

    // The evictable that ends first, if it does until `now`; `none` otherwise. It stays the first until it is dropped.
    Handle first(const Nodes& nodes, Moment now) {
        if (is_awake_) {
            reserve(nodes, waiting_.size());
            for (const End& end : waiting_) {
                push(end);
            }
            waiting_.clear();
            is_awake_ = false;
        }
        while (!ends_.empty()) {
            const End& first = ends_.front();
            if (first.at > now) {
                break;
            }
            if (of(nodes, first.handle) == first.at) {
                return first.handle;
            }
            drop_first();
        }
        return none;
    }
    void drop_first() {
        std::pop_heap(ends_.begin(), ends_.end());
        ends_.pop_back();
    }
    // As `drop_first`, until `wake`: somebody still needs it.
    void put_off_first() {
        waiting_.push_back(ends_.front());
        drop_first();
    }
    // Whoever needed what was put off may not any more.
    void wake() { is_awake_ = !waiting_.empty(); }

    // Forget entries that mean nothing any more, once they are the most of all.
    void tidy(const Nodes& nodes) {
        if (ends_.size() <= 2 * std::size_t{count_} + 64) {
            return;
        }
        std::erase_if(ends_, [&](const End& end) { return of(nodes, end.handle) != end.at; });
        std::make_heap(ends_.begin(), ends_.end());
    }
    std::size_t entry_count() const { return ends_.size() + waiting_.size(); }

  private:
    struct End {
        Moment at;
        Handle handle;
        // The earliest on top. Of equal ones that of the smaller number: mostly that on which the others hang, with which they go.
        friend bool operator<(const End& left, const End& right) {
            return left.at != right.at ? left.at > right.at : left.handle > right.handle;
        }
    };

    void push(End end) {
        ends_.push_back(end);
        std::push_heap(ends_.begin(), ends_.end());
    }
    static bool is_set(const Nodes& nodes, Handle handle) {
        return nodes.has(node_of(handle), is_timed << kind_of(handle));
    }

    Chunked<std::array<Moment, 3>> moments_;  // by node: of its attention, its states, and the prompts that end there
    std::vector<End> ends_;                   // a heap; an entry counts while it says what `moments_` says
    std::vector<End> waiting_;
    bool is_awake_ = false;
    std::uint32_t count_ = 0;
};

}  // namespace kvstore::index
