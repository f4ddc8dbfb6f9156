#include "batch.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

#include "../arena/process_file.h"

namespace kvstore::io {
namespace {

constexpr std::size_t nobody = std::numeric_limits<std::size_t>::max();

}  // namespace

Batch::Batch(Private, std::vector<Task> work)
    : size_(work.size()), forks_(fork_count()), tasks_(std::move(work)), wake_at_(nobody) {
    ended_.reserve(size_);
}

std::shared_ptr<Batch> Batch::make(std::vector<Task> work) {
    return std::shared_ptr<Batch>(new Batch(Private{}, std::move(work)), [](Batch* batch) {
        if (!batch->is_inherited()) {
            delete batch;
        }
    });
}

Batch::~Batch() {
    if (descriptor_ >= 0) {
        ::close(descriptor_);
    }
}

bool Batch::is_inherited() const { return fork_count() != forks_; }

std::size_t Batch::wait(std::size_t count, Clock::time_point until) {
    std::unique_lock lock(mutex_);
    while (ended_.size() < count) {
        wake_at_ = std::min(wake_at_, count);
        if (changed_.wait_until(lock, until) == std::cv_status::timeout) {
            break;
        }
    }
    return ended_.size();
}

std::vector<std::int64_t> Batch::ended() const {
    const std::lock_guard lock(mutex_);
    return ended_;
}

std::vector<Failure> Batch::failures() const {
    const std::lock_guard lock(mutex_);
    std::vector<Failure> failures;
    for (const std::int64_t number : ended_) {
        const Task& task = tasks_[static_cast<std::size_t>(number)];
        if (task.error != 0) {
            failures.push_back({number, task.error, static_cast<std::int64_t>(task.file),
                                static_cast<std::int64_t>(task.failed_at), static_cast<std::int64_t>(task.why)});
        }
    }
    return failures;
}

int Batch::descriptor() {
    const std::lock_guard lock(mutex_);
    if (descriptor_ < 0) {
        descriptor_ = ::eventfd(ended_.size() == size_ ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (descriptor_ < 0) {
            throw std::system_error(errno, std::generic_category(), "eventfd");
        }
    }
    return descriptor_;
}

void Batch::end(std::uint32_t task) noexcept {
    const std::lock_guard lock(mutex_);
    ended_.push_back(task);
    if (ended_.size() == size_ && descriptor_ >= 0) {
        // An eventfd that was never written to takes a one.
        static_cast<void>(::eventfd_write(descriptor_, 1));
    }
    if (ended_.size() >= wake_at_) {
        wake_at_ = nobody;
        changed_.notify_all();
    }
}

}  // namespace kvstore::io
