// Chunk grid digests by number: many records share few of them, and each goes with the last record that names it.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "digest_hash.h"
#include "types.h"

namespace kvstore::index {

using GridId = std::uint32_t;

constexpr GridId unknown_grid = 0;  // the digest of zeros: nobody named the boundaries
constexpr GridId any_grid = none;

class Grids {
    struct Entry {
        Digest digest;
        std::uint32_t users;
    };

  public:
    static constexpr std::size_t grid_bytes = sizeof(Entry) + 2 * sizeof(Digest) + 48;

    explicit Grids(std::uint64_t seed) : entries_{Entry{Digest{}, 1}}, numbers_(16, DigestHash(seed)) {
        numbers_.emplace(Digest{}, unknown_grid);
    }

    const Digest& digest(GridId id) const { return entries_[id].digest; }
    std::uint32_t users(GridId id) const { return entries_[id].users; }
    std::size_t size() const { return numbers_.size() - 1; }
    // Uses of all but the unknown grid.
    std::uint64_t uses() const {
        std::uint64_t count = 0;
        for (GridId id = 1; id < entries_.size(); ++id) {
            count += entries_[id].users;
        }
        return count;
    }

    // A number that no record has when no record names this digest.
    GridId find(const Digest& digest) const {
        const auto found = numbers_.find(digest);
        return found == numbers_.end() ? none - 1 : found->second;
    }

    // One record more names it. Strong exception guarantee.
    GridId use(const Digest& digest) {
        const auto found = numbers_.find(digest);
        if (found != numbers_.end()) {
            ++entries_[found->second].users;
            return found->second;
        }
        if (free_.empty()) {
            reserve_one(entries_);
            free_.reserve(entries_.capacity());
        }
        const GridId id = free_.empty() ? static_cast<GridId>(entries_.size()) : free_.back();
        numbers_.emplace(digest, id);
        if (free_.empty()) {
            entries_.push_back({digest, 1});
        } else {
            free_.pop_back();
            entries_[id] = {digest, 1};
        }
        return id;
    }

    void drop(GridId id) {
        if (--entries_[id].users == 0) {
            numbers_.erase(entries_[id].digest);
            free_.push_back(id);
        }
    }

  private:
    std::vector<Entry> entries_;
    std::vector<GridId> free_;
    std::unordered_map<Digest, GridId, DigestHash> numbers_;
};

}  // namespace kvstore::index
