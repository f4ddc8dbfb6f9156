// Reads, writes and syncs of files, as rows that Python hands over and as the pieces that are begun one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace kvstore::io {

// Addresses, offsets and sizes are multiples of this; FILE_ALIGN_BYTES of kvstore/limits.py.
inline constexpr std::uint64_t align_bytes = 4096;

// kvstore.abc.files.FileOperation
enum class Kind : std::uint64_t { read = 0, write = 1, sync = 2 };

struct Row {
    std::uint64_t kind;
    std::uint64_t file;
    std::uint64_t offset;
    std::uint64_t address;
    std::uint64_t size_bytes;
};
static_assert(sizeof(Row) == 40);

class Batch;

// A part of an operation, small enough that a large read fills the queue.
struct Piece {
    std::shared_ptr<Batch> batch;
    std::uint32_t task = 0;
    Kind kind = Kind::read;
    bool is_urgent = false;
    int descriptor = -1;
    std::uint64_t offset = 0;
    std::byte* address = nullptr;
    std::uint64_t size_bytes = 0;
    unsigned fruitless = 0;  // how often it was tried in a row without moving a byte
};

}  // namespace kvstore::io
