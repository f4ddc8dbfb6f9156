// Operations on open files: submitted in batches, split into pieces, begun in the order of the line, moved by a mover.
//
// What a system call leaves undone is taken up here, the same for every mover: short reads and writes go on where they ended,
// interrupted ones begin again, and the end of a file is an error.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <unordered_map>

#include "batch.h"
#include "line.h"
#include "mover.h"

namespace kvstore::io {

// FILE_DEPTH_MAX and FILE_URGENT_DEPTH of kvstore/limits.py stay far below.
inline constexpr unsigned depth_max = 1U << 12;

// FILE_BATCH_OPERATIONS_MAX and FILE_OPERATIONS_MAX of kvstore/limits.py: of one batch, and of all that have not ended.
inline constexpr std::size_t batch_operations_max = std::size_t{1} << 18;
inline constexpr std::size_t operations_max = std::size_t{1} << 20;

class ClosedError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Any thread. It owns no descriptor: whoever added a file closes it.
class Engine final : private PieceSource {
    struct Private {};

  public:
    Engine(Private /*made by `make`*/, LineRules rules);
    // A forked child leaves it where it is, for it has none of its threads.
    static std::shared_ptr<Engine> make(const MakeMover& make_mover, LineRules rules);
    ~Engine() override;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // A number for an open descriptor; numbers do not come again. Throws ClosedError.
    std::uint64_t add_file(int descriptor);
    // The number ends. Throws std::invalid_argument when there is no such file, or operations of it have not ended.
    void remove_file(std::uint64_t file);

    // Throws std::invalid_argument and begins nothing when a row is no operation on a file, or there are too many. Nobody may
    // change the rows meanwhile.
    std::shared_ptr<Batch> submit(std::span<const Row> rows, bool is_urgent);
    // What has not been begun of the batch ends with ECANCELED.
    void cancel(Batch& batch);
    // What has not been begun ends with ECANCELED, what has been begun is waited for. Idempotent.
    void close();

    bool is_inherited() const;

  private:
    struct File {
        int descriptor;
        std::size_t operations = 0;
    };

    std::optional<Piece> next() override;
    void ended(Piece piece, std::int64_t result) override;
    void refused(Piece piece, int error) override;
    void end(const Piece& piece, const Failure& failure);
    // What is left to do of a piece after a result; nothing when it is done or has failed.
    static std::optional<Piece> rest_of(Piece piece, std::int64_t result, Failure& failure);
    void check_open() const;
    Task task_of(const Row& row, std::size_t number) const;
    void drop(const Batch* batch) noexcept;
    void finish_if_over(Batch& batch, std::uint32_t number);

    const std::uint64_t forks_;
    const LineRules rules_;
    std::mutex mutex_;
    std::condition_variable all_ended_;
    Line line_;
    std::unordered_map<std::uint64_t, File> files_;
    std::uint64_t next_file_ = 1;
    std::size_t operations_ = 0;  // that have not ended
    bool is_closed_ = false;
    std::mutex closing_;
    std::shared_ptr<Mover> mover_;
};

}  // namespace kvstore::io
