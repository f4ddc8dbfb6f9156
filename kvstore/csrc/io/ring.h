// One io_uring instance, by system calls. Used by the thread that made it, and by no other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "ring_abi.h"

namespace kvstore::io {

class Ring {
  public:
    // Room for `entries` operations under way. Throws std::system_error with what the kernel said.
    explicit Ring(unsigned entries);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Queues one. REQUIRES: fewer than `entries` are under way.
    void push(const abi::Submission& submission);
    // Begins what is queued, and waits until one has ended or, without `waits`, not. Throws std::system_error.
    void enter(bool waits);
    // One that has ended, if there is one.
    std::optional<abi::Completion> pop();
    // The `user_data` of one that is queued and was not begun; it never will be. Nothing when there is none left.
    std::optional<std::uint64_t> take_back();

    // Whether the kernel knows an operation.
    bool knows(std::uint8_t operation) const { return known_[operation]; }

  private:
    class Mapping {
      public:
        Mapping() = default;
        void map(int descriptor, std::size_t size_bytes, std::uint64_t offset);
        ~Mapping();
        Mapping(const Mapping&) = delete;
        Mapping& operator=(const Mapping&) = delete;
        template <typename Value>
        Value* at(std::uint32_t offset) const {
            return reinterpret_cast<Value*>(data_ + offset);
        }

      private:
        std::byte* data_ = nullptr;
        std::size_t size_bytes_ = 0;
    };

    void ask_what_it_knows();

    int descriptor_ = -1;
    Mapping rings_;
    Mapping entries_;
    std::uint32_t* submission_tail_ = nullptr;
    std::uint32_t submission_mask_ = 0;
    std::uint32_t* completion_head_ = nullptr;
    std::uint32_t* completion_tail_ = nullptr;
    std::uint32_t completion_mask_ = 0;
    abi::Submission* submissions_ = nullptr;
    abi::Completion* completions_ = nullptr;
    std::uint32_t queued_ = 0;
    unsigned fruitless_ = 0;  // how often in a row the kernel had no room, and nothing ended
    bool known_[256] = {};
};

// Why io_uring with so many entries cannot be used here; empty when it can.
std::string why_no_ring(unsigned entries);

}  // namespace kvstore::io
