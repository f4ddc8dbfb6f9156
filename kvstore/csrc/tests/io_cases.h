// A mover whose pieces end when and how the test says, and memory and files for tests of file I/O.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../io/batch.h"
#include "../io/engine.h"
#include "../io/mover.h"
#include "check.h"

namespace kvstore::testing {

inline io::Clock::time_point soon() { return io::Clock::now() + std::chrono::seconds(30); }

// What has been begun, for the test to end.
struct Stage {
    io::PieceSource* source = nullptr;
    std::vector<io::Piece> begun;
    bool is_stopped = false;

    // Begins whatever may begin.
    void begin() {
        while (std::optional<io::Piece> piece = source->next()) {
            begun.push_back(*std::move(piece));
        }
    }
    void end(std::size_t at, std::int64_t result) {
        io::Piece piece = std::move(begun.at(at));
        begun.erase(begun.begin() + static_cast<std::ptrdiff_t>(at));
        source->ended(std::move(piece), result);
    }
    // The mover itself has failed.
    void refuse(std::size_t at, int error) {
        io::Piece piece = std::move(begun.at(at));
        begun.erase(begun.begin() + static_cast<std::ptrdiff_t>(at));
        source->refused(std::move(piece), error);
    }
    // The whole piece was moved.
    void end_well(std::size_t at) { end(at, static_cast<std::int64_t>(begun.at(at).size_bytes)); }
    // Begins and ends until nothing is left.
    void run() {
        for (begin(); !begun.empty(); begin()) {
            end_well(0);
        }
    }
};

class StagedMover final : public io::Mover {
  public:
    explicit StagedMover(Stage& stage) : stage_(stage) {}
    void wake(std::size_t /*pieces*/) override {}
    void stop() override { stage_.is_stopped = true; }

  private:
    Stage& stage_;
};

inline std::shared_ptr<io::Engine> staged_engine(Stage& stage, io::LineRules rules) {
    return io::Engine::make(
        [&stage](io::PieceSource& source, unsigned) {
            stage.source = &source;
            return std::make_unique<StagedMover>(stage);
        },
        rules);
}

class Pages {
  public:
    explicit Pages(std::size_t size_bytes)
        : size_bytes_(size_bytes),
          data_(static_cast<std::byte*>(
              ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
        check(data_ != MAP_FAILED, "memory");
    }
    ~Pages() { ::munmap(data_, size_bytes_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    std::byte* data() const { return data_; }
    std::size_t size_bytes() const { return size_bytes_; }
    std::uint64_t address(std::size_t offset = 0) const { return reinterpret_cast<std::uintptr_t>(data_) + offset; }
    void fill(unsigned seed) {
        std::uint32_t state = seed * 2654435761U + 1;
        for (std::size_t i = 0; i < size_bytes_; ++i) {
            state = state * 1664525U + 1013904223U;
            data_[i] = static_cast<std::byte>(state >> 24);
        }
    }

  private:
    std::size_t size_bytes_;
    std::byte* data_;
};

// A file without a name, in memory.
class TemporaryFile {
  public:
    TemporaryFile() : descriptor_(::memfd_create("kvstore-test", MFD_CLOEXEC)) { check(descriptor_ >= 0, "memfd"); }
    ~TemporaryFile() { ::close(descriptor_); }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    int get() const { return descriptor_; }

  private:
    int descriptor_;
};

inline io::Row row(io::Kind kind, std::uint64_t file, std::uint64_t offset, std::uint64_t address, std::uint64_t size) {
    return {static_cast<std::uint64_t>(kind), file, offset, address, size};
}

}  // namespace kvstore::testing
