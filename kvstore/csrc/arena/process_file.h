// File descriptors that belong to one process: its forked children close them.
#pragma once

#include <cstdint>
#include <string>

namespace kvstore {

// An open file. exec closes it (O_CLOEXEC), and so does a child made by fork before it runs anything else: a lock on an
// open file is shared with the child, and would otherwise outlive its owner.
class ProcessFile {
  public:
    ProcessFile() = default;
    // A descriptor below zero, with errno as the system call left it, when that fails.
    static ProcessFile open(const std::string& path, int flags, unsigned mode = 0);
    static ProcessFile memfd(const std::string& name, unsigned flags);

    ProcessFile(ProcessFile&& other) noexcept;
    ProcessFile& operator=(ProcessFile&& other) noexcept;
    ~ProcessFile() { close(); }

    int get() const { return descriptor_; }
    explicit operator bool() const { return descriptor_ >= 0; }
    // Another open file description of the same file: what is locked through this one is not locked through that.
    ProcessFile reopen(int flags) const;
    // Where the kernel shows this descriptor as a file.
    std::string proc_path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }
    void close() noexcept;

  private:
    explicit ProcessFile(int descriptor) : descriptor_(descriptor) {}

    int descriptor_ = -1;
};

// Grows by one in every forked child: what remembers an older value was made by an ancestor.
std::uint64_t fork_count() noexcept;

}  // namespace kvstore
