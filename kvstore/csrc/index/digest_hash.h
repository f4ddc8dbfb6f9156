// A hash of digests under a secret: peers name keys and grids as they like, and must not choose where these fall in a
// table. All 32 bytes enter, by two wide products of words that the secret has changed (as in wyhash).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace kvstore::index {

class DigestHash {
    __extension__ using Wide = unsigned __int128;

  public:
    explicit DigestHash(std::uint64_t seed) {
        for (std::uint64_t& secret : secrets_) {
            seed += 0x9e3779b97f4a7c15ULL;
            std::uint64_t value = seed;
            value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
            value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
            secret = value ^ (value >> 31);
        }
    }

    std::uint64_t operator()(const Digest& digest) const {
        std::array<std::uint64_t, 4> words;
        std::memcpy(words.data(), digest.bytes.data(), digest_bytes);
        return multiply(words[0] ^ secrets_[0], words[1] ^ secrets_[1]) ^
               multiply(words[2] ^ secrets_[2], words[3] ^ secrets_[3]);
    }

    // A chain of numbers, each entering in turn.
    std::uint64_t begin(std::uint64_t number) const { return multiply(number ^ secrets_[0], secrets_[1]); }
    std::uint64_t next(std::uint64_t state, std::uint32_t number) const {
        return multiply(state ^ number ^ secrets_[2], secrets_[3]);
    }

  private:
    static std::uint64_t multiply(std::uint64_t left, std::uint64_t right) {
        const Wide product = static_cast<Wide>(left) * right;
        return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
    }

    std::array<std::uint64_t, 4> secrets_{};
};

}  // namespace kvstore::index
