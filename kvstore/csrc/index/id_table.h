// A hash table from 32 bits of hash to ids: open addressing, eight bytes per place. Who asks compares the full key.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "types.h"

namespace kvstore::index {

class IdTable {
    struct Place {
        std::uint32_t hash;
        std::uint32_t id;
    };

  public:
    IdTable() : places_(std::size_t{1} << bits_, Place{0, none}) {}

    std::size_t size() const { return size_; }
    std::size_t allocated_bytes() const { return places_.size() * sizeof(Place); }

    void prefetch(std::uint32_t hash) const { __builtin_prefetch(&places_[home(hash)]); }

    // The first id under this hash for which `is_it` holds, or `none`.
    template <typename Predicate>
    std::uint32_t find(std::uint32_t hash, Predicate is_it) const {
        for (std::size_t at = home(hash); places_[at].id != none; at = next(at)) {
            if (places_[at].hash == hash && is_it(places_[at].id)) {
                return places_[at].id;
            }
        }
        return none;
    }

    // Afterwards `insert` does not allocate until there are that many. Strong exception guarantee.
    void reserve(std::size_t size) {
        unsigned bits = bits_;
        while (size * 4 > (std::size_t{3} << bits)) {
            ++bits;
        }
        if (bits != bits_) {
            grow(bits);
        }
    }

    void insert(std::uint32_t hash, std::uint32_t id) {
        reserve(size_ + 1);
        place(hash, id);
        ++size_;
    }

    // The pair must be there.
    void erase(std::uint32_t hash, std::uint32_t id) {
        std::size_t hole = home(hash);
        while (places_[hole].id != id) {
            hole = next(hole);
        }
        // What was pushed past the hole moves back into it, so that no search ends too early.
        for (std::size_t at = next(hole); places_[at].id != none; at = next(at)) {
            const std::size_t wanted = home(places_[at].hash);
            if (((at - wanted) & (places_.size() - 1)) >= ((at - hole) & (places_.size() - 1))) {
                places_[hole] = places_[at];
                hole = at;
            }
        }
        places_[hole].id = none;
        --size_;
    }

  private:
    std::size_t home(std::uint32_t hash) const { return hash >> (32 - bits_); }
    std::size_t next(std::size_t at) const { return (at + 1) & (places_.size() - 1); }

    void place(std::uint32_t hash, std::uint32_t id) {
        std::size_t at = home(hash);
        while (places_[at].id != none) {
            at = next(at);
        }
        places_[at] = {hash, id};
    }

    void grow(unsigned bits) {
        std::vector<Place> old(std::size_t{1} << bits, Place{0, none});
        old.swap(places_);
        bits_ = bits;
        for (const Place& known : old) {
            if (known.id != none) {
                place(known.hash, known.id);
            }
        }
    }

    unsigned bits_ = 4;
    std::vector<Place> places_;
    std::size_t size_ = 0;
};

}  // namespace kvstore::index
