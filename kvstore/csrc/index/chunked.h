// An array that grows by chunks: nothing is copied when it does, and its memory is proportional to its size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace kvstore::index {

template <typename T>
class Chunked {
    static_assert(std::is_trivially_copyable_v<T>);
    static constexpr unsigned shift = 10;
    static constexpr std::uint32_t mask = (1U << shift) - 1;

  public:
    T& operator[](std::uint32_t position) { return chunks_[position >> shift][position & mask]; }
    const T& operator[](std::uint32_t position) const { return chunks_[position >> shift][position & mask]; }

    std::uint32_t size() const { return size_; }
    std::size_t allocated_bytes() const { return chunks_.size() * sizeof(T) << shift; }

    // Afterwards `append` does not allocate until there are that many. Strong exception guarantee.
    void reserve(std::size_t size) {
        while (chunks_.size() << shift < size) {
            chunks_.push_back(std::make_unique_for_overwrite<T[]>(std::size_t{1} << shift));
        }
    }
    std::uint32_t append(const T& value) {
        reserve(std::size_t{size_} + 1);
        (*this)[size_] = value;
        return size_++;
    }

  private:
    std::vector<std::unique_ptr<T[]>> chunks_;
    std::uint32_t size_ = 0;
};

}  // namespace kvstore::index
