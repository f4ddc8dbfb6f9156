// Memory that other processes can map: anonymous (memfd), or a named file in a directory of shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "process_file.h"

namespace kvstore {

// Shared memory cannot be had: too little room, or another owner. The message names the limit and the remedy.
class ArenaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Whether the kernel backs the memory with huge pages, and why not.
struct HugePages {
    bool in_use = false;
    std::string why_not;
};

// What lies in the first page, so that an attaching process, or the next owner of a name, knows what it has before it.
struct ArenaHeader {
    char magic[8];
    std::uint32_t version;
    std::uint32_t owner_pid;  // for messages; the lock decides who owns a name
    std::uint64_t capacity_bytes;
};
inline constexpr char arena_magic[8] = {'K', 'V', 'A', 'R', 'E', 'N', 'A', '\0'};
inline constexpr std::uint32_t arena_version = 1;
// The first slab begins here.
inline constexpr std::uint64_t arena_header_bytes = 4096;

// A mapping whose every page exists: touching it cannot fail. Its memory is unmapped with the last reference.
class SharedMemory {
    struct Private {};

  public:
    explicit SharedMemory(Private /*made by the functions below*/) {}
    // memfd, on reserved huge pages where enough of them are free.
    static std::shared_ptr<SharedMemory> anonymous(std::uint64_t capacity_bytes);

    // `kvstore-<name>` in `directory`, which is memory. The name belongs to the process that holds the file's lock;
    // what a dead owner left is removed. Throws ArenaError when somebody else owns the name, or there is no room.
    static std::shared_ptr<SharedMemory> named(const std::string& directory, const std::string& name,
                                               std::uint64_t capacity_bytes);

    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory();

    std::byte* data() const { return data_; }
    std::uint64_t size_bytes() const { return size_bytes_; }
    // To be passed to other processes; below zero after `release`, and in a forked child.
    int descriptor() const { return is_inherited() ? -1 : memory_.get(); }
    const std::string& path() const { return path_; }
    const HugePages& huge_pages() const { return huge_pages_; }
    // Whether this process was forked from the one that made it.
    bool is_inherited() const { return fork_count() != made_at_fork_; }

    // Gives up the name and the descriptor. The mapping stays for those who still look at it. Idempotent.
    void release() noexcept;

  private:
    // Maps and populates `memory_`; what the system said when it cannot, else nothing.
    std::string map(std::uint64_t size_bytes, bool ask_for_huge_pages);
    void write_header(std::uint64_t capacity_bytes);
    bool map_huge_pages(std::uint64_t size_bytes);

    ProcessFile lock_;
    ProcessFile memory_;
    std::string path_;
    std::byte* data_ = nullptr;
    std::uint64_t size_bytes_ = 0;
    HugePages huge_pages_;
    std::uint64_t made_at_fork_ = fork_count();
};

}  // namespace kvstore
