// A set of slab numbers that gives the lowest one and never allocates after construction.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvstore {

class SlabSet {
  public:
    static constexpr std::uint32_t none = UINT32_MAX;

    explicit SlabSet(std::size_t slabs) : words_((slabs + 63) / 64) {}

    void insert(std::uint32_t slab) {
        std::uint64_t& word = words_[slab / 64];
        size_ += static_cast<std::size_t>((word >> slab % 64 & 1) == 0);
        word |= std::uint64_t{1} << slab % 64;
    }
    void erase(std::uint32_t slab) {
        std::uint64_t& word = words_[slab / 64];
        size_ -= static_cast<std::size_t>(word >> slab % 64 & 1);
        word &= ~(std::uint64_t{1} << slab % 64);
    }
    bool contains(std::uint32_t slab) const { return (words_[slab / 64] >> slab % 64 & 1) != 0; }
    std::size_t size() const { return size_; }
    std::uint32_t first() const {
        for (std::size_t index = 0; index < words_.size(); ++index) {
            if (words_[index] != 0) {
                return static_cast<std::uint32_t>(index * 64) + static_cast<std::uint32_t>(std::countr_zero(words_[index]));
            }
        }
        return none;
    }

  private:
    std::vector<std::uint64_t> words_;
    std::size_t size_ = 0;
};

}  // namespace kvstore
