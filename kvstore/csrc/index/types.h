// The words that the parts of the index share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kvstore::index {

using NodeId = std::uint32_t;
using RecordId = std::uint32_t;

constexpr std::uint32_t none = 0xffffffff;

constexpr std::size_t digest_bytes = 32;

// A prefix key, a root key or the digest of a chunk grid: 32 bytes.
struct Digest {
    std::array<std::uint8_t, digest_bytes> bytes;

    friend bool operator==(const Digest& left, const Digest& right) {
        return std::memcmp(left.bytes.data(), right.bytes.data(), digest_bytes) == 0;
    }
};

// Afterwards one more element fits without allocating. Doubles, as `push_back` would: `reserve(size + 1)` might not.
template <typename Vector>
void reserve_one(Vector& values) {
    if (values.size() == values.capacity()) {
        values.reserve(values.empty() ? 8 : 2 * values.size());
    }
}

// Where a record lies in its tier.
struct Slot {
    std::uint64_t index = 0;
    std::uint64_t generation = 0;
    std::uint32_t size_bytes = 0;

    friend bool operator==(const Slot&, const Slot&) = default;
};

// In which tier and codec a record is there. Several may stand side by side for one record.
struct Residency {
    std::uint8_t tier = 0;
    std::uint8_t codec = 0;
    bool is_lossy = false;
};

// The prefix nodes that one prompt passes through: whole blocks, then possibly a tail. Borrowed memory.
struct Path {
    Digest root;
    std::uint32_t block_tokens;
    const Digest* keys;
    std::uint32_t blocks;
    const Digest* tail_key;  // nullptr without a tail
    std::span<const std::uint32_t> tail_ids;

    std::uint32_t size() const { return blocks + (tail_key != nullptr ? 1 : 0); }
    bool is_tail(std::uint32_t number) const { return number >= blocks; }
    const Digest& key(std::uint32_t number) const { return number < blocks ? keys[number] : *tail_key; }
    std::uint32_t end_tokens(std::uint32_t number) const {
        return is_tail(number) ? blocks * block_tokens + static_cast<std::uint32_t>(tail_ids.size())
                               : (number + 1) * block_tokens;
    }
};

}  // namespace kvstore::index
