#include "thread_mover.h"

#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../signals_blocked.h"

namespace kvstore::io {
namespace {

std::int64_t move_piece(const Piece& piece) {
    const auto offset = static_cast<off_t>(piece.offset);
    std::int64_t result = 0;
    switch (piece.kind) {
        case Kind::read:
            result = ::pread(piece.descriptor, piece.address, piece.size_bytes, offset);
            break;
        case Kind::write:
            result = ::pwrite(piece.descriptor, piece.address, piece.size_bytes, offset);
            break;
        case Kind::sync:
            result = ::fdatasync(piece.descriptor);
            break;
    }
    return result < 0 ? -std::int64_t{errno} : result;
}

class ThreadMover final : public Mover {
  public:
    ThreadMover(PieceSource& source, unsigned depth) : source_(source), depth_(depth) {
        const std::lock_guard lock(mutex_);
        threads_.reserve(depth);
        start_threads(1);
    }
    ~ThreadMover() override { stop(); }

    void wake(std::size_t pieces) override {
        const std::lock_guard lock(mutex_);
        if (is_stopping_) {
            return;
        }
        const std::size_t wanted = std::min<std::size_t>(calls_ + pieces, depth_);
        if (wanted > idle_ && threads_.size() < depth_) {
            try {
                start_threads(std::min<std::size_t>(wanted - idle_, depth_ - threads_.size()));
            } catch (const std::exception&) {
                // The system gives no more threads, or no memory for them; those there are do the work. What was submitted
                // is under way, so this must not throw.
            }
        }
        calls_ = wanted;
        for (std::size_t i = 0; i < std::min(wanted, idle_); ++i) {
            has_call_.notify_one();
        }
    }

    void stop() override {
        {
            const std::lock_guard lock(mutex_);
            is_stopping_ = true;
            has_call_.notify_all();
        }
        for (std::thread& thread : threads_) {
            if (thread.joinable()) {
                thread.join();
            }
        }
    }

  private:
    void start_threads(std::size_t count) {
        const SignalsBlocked blocked;
        for (std::size_t i = 0; i < count; ++i) {
            threads_.emplace_back([this] { run(); });
            ++idle_;
        }
    }

    void run() {
        pthread_setname_np(pthread_self(), "kvstore-io");
        std::unique_lock lock(mutex_);
        while (true) {
            has_call_.wait(lock, [this] { return calls_ > 0 || is_stopping_; });
            if (is_stopping_) {
                return;
            }
            --calls_;
            --idle_;
            lock.unlock();
            while (std::optional<Piece> piece = source_.next()) {
                const std::int64_t result = move_piece(*piece);
                if (result == -EAGAIN) {
                    std::this_thread::sleep_for(std::chrono::milliseconds(1));
                }
                source_.ended(*std::move(piece), result);
            }
            lock.lock();
            ++idle_;
        }
    }

    PieceSource& source_;
    const unsigned depth_;
    std::mutex mutex_;
    std::condition_variable has_call_;
    std::size_t calls_ = 0;  // threads that are to look for pieces
    std::size_t idle_ = 0;   // threads that look for none
    bool is_stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Mover> make_thread_mover(PieceSource& source, unsigned depth) {
    return std::make_unique<ThreadMover>(source, depth);
}

}  // namespace kvstore::io
