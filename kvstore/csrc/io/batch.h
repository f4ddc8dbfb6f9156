// Operations that were submitted together, and how each ended.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "operation.h"

namespace kvstore::io {

using Clock = std::chrono::steady_clock;

// What an error number is of.
enum class Why : std::int64_t {
    operation = 0,  // the system's answer
    file_end = 1,   // the file ends within what was to be read
    mover = 2,      // not this operation: what moves all of them has failed
};

// One operation on its way. Guarded by the mutex of the engine that it was submitted to until it is over; it stays then as it is.
struct Task {
    Kind kind;
    std::uint64_t file;
    int descriptor;
    std::uint64_t offset;
    std::byte* address;
    std::uint64_t length;      // bytes; 1 for a sync
    std::uint64_t begun = 0;   // of `length`
    unsigned in_flight = 0;    // pieces
    int error = 0;             // of the first piece that failed
    std::uint64_t failed_at = 0;
    Why why = Why::operation;
    bool is_stopped = false;   // begin no more of it
    bool is_over = false;
};

struct Failure {
    std::int64_t task;
    std::int64_t error;       // an error number
    std::int64_t file;
    std::int64_t offset;      // where the first piece failed
    std::int64_t why;         // `Why`
};
static_assert(sizeof(Failure) == 40);

// Any thread. A forked child must not ask its parent's batches for anything: see `is_inherited`.
class Batch {
    struct Private {};

  public:
    Batch(Private /*made by `make`*/, std::vector<Task> work);
    // A child leaves it where it is: what waits in the parent would keep the destructor of a condition variable waiting.
    static std::shared_ptr<Batch> make(std::vector<Task> work);
    ~Batch();
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    std::size_t size() const { return size_; }
    // Whether this process was forked from the one that submitted it.
    bool is_inherited() const;

    // Waits until `count` have ended, or the moment has come: how many have by then.
    std::size_t wait(std::size_t count, Clock::time_point until);
    // Numbers of those that have ended, in that order.
    std::vector<std::int64_t> ended() const;
    std::vector<Failure> failures() const;
    // An eventfd that is readable once all have ended; the batch owns it. Throws std::system_error.
    int descriptor();

    // For the engine, under its mutex.
    std::vector<Task>& tasks() { return tasks_; }
    // For the engine, under its mutex: an operation is over. Takes no memory, so that the threads of a mover cannot run out of it.
    void end(std::uint32_t task) noexcept;

  private:
    const std::size_t size_;
    const std::uint64_t forks_;
    std::vector<Task> tasks_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::size_t wake_at_;  // the smallest count that somebody waits for
    std::vector<std::int64_t> ended_;
    int descriptor_ = -1;
};

}  // namespace kvstore::io
