#include "ring_mover.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <future>
#include <limits>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../signals_blocked.h"
#include "ring.h"

namespace kvstore::io {
namespace {

constexpr std::uint64_t alarm_number = std::numeric_limits<std::uint64_t>::max();

// An eventfd that ends the wait of the thread, through the ring itself.
class Alarm {
  public:
    Alarm() : descriptor_(::eventfd(0, EFD_CLOEXEC)) {
        if (descriptor_ < 0) {
            throw std::system_error(errno, std::generic_category(), "eventfd");
        }
    }
    ~Alarm() { ::close(descriptor_); }
    Alarm(const Alarm&) = delete;
    Alarm& operator=(const Alarm&) = delete;

    void ring() { static_cast<void>(::eventfd_write(descriptor_, 1)); }
    abi::Submission read_once() {
        abi::Submission submission{};
        submission.operation = abi::operation_read;
        submission.descriptor = descriptor_;
        submission.address = reinterpret_cast<std::uintptr_t>(&value_);
        submission.size_bytes = sizeof(value_);
        submission.user_data = alarm_number;
        return submission;
    }

  private:
    int descriptor_;
    std::uint64_t value_ = 0;
};

class RingMover final : public Mover {
  public:
    RingMover(PieceSource& source, unsigned depth) : source_(source), pieces_(depth) {
        for (std::uint32_t slot = depth; slot-- > 0;) {
            free_.push_back(slot);
        }
        std::promise<void> started;
        std::future<void> ready = started.get_future();
        {
            const SignalsBlocked blocked;
            thread_ = std::thread([this, promise = std::move(started)]() mutable { run(std::move(promise)); });
        }
        try {
            ready.get();
        } catch (...) {
            thread_.join();
            throw;
        }
    }
    ~RingMover() override { stop(); }

    void wake(std::size_t /*pieces*/) override {
        if (is_asleep_.exchange(false)) {
            alarm_.ring();
            is_asleep_.notify_one();
        }
    }

    void stop() override {
        is_stopping_.store(true);
        wake(0);
        if (thread_.joinable()) {
            thread_.join();
        }
    }

  private:
    void run(std::promise<void> started) {
        pthread_setname_np(pthread_self(), "kvstore-io");
        std::optional<Ring> ring;
        try {
            ring.emplace(static_cast<unsigned>(pieces_.size()) + 1);
        } catch (...) {
            started.set_exception(std::current_exception());
            return;
        }
        ring->push(alarm_.read_once());
        started.set_value();
        while (!is_stopping_.load()) {
            begin_pieces(*ring);
            // Whoever adds pieces from here on rings; what was added before is seen now.
            is_asleep_.store(true);
            begin_pieces(*ring);
            try {
                ring->enter(!is_stopping_.load());
            } catch (const std::system_error& error) {
                refuse_pieces(*ring, error.code().value());
                return;
            }
            is_asleep_.store(false);
            if (take_completions(*ring)) {
                ring->push(alarm_.read_once());
            }
        }
    }

    // The kernel takes nothing from the ring any more. What it has begun ends yet, and uses the memory of its piece until then.
    void refuse_pieces(Ring& ring, int error) {
        while (const std::optional<std::uint64_t> number = ring.take_back()) {
            if (*number != alarm_number) {
                const auto slot = static_cast<std::uint32_t>(*number);
                source_.refused(*std::exchange(pieces_[slot], std::nullopt), error);
                free_.push_back(slot);
            }
        }
        while (true) {
            is_asleep_.store(true);
            if (is_stopping_.load()) {
                return;
            }
            while (std::optional<Piece> piece = source_.next()) {
                source_.refused(*std::move(piece), error);
            }
            static_cast<void>(take_completions(ring));
            if (free_.size() < pieces_.size()) {
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            } else {
                is_asleep_.wait(true);
            }
        }
    }

    void begin_pieces(Ring& ring) {
        while (!free_.empty()) {
            std::optional<Piece> piece = source_.next();
            if (!piece) {
                break;
            }
            const std::uint32_t slot = free_.back();
            free_.pop_back();
            ring.push(submission_of(*piece, slot));
            pieces_[slot] = std::move(piece);
        }
    }

    static abi::Submission submission_of(const Piece& piece, std::uint32_t slot) {
        abi::Submission submission{};
        submission.descriptor = piece.descriptor;
        submission.user_data = slot;
        if (piece.kind == Kind::sync) {
            submission.operation = abi::operation_fsync;
            submission.operation_flags = abi::fsync_datasync;
            return submission;
        }
        submission.operation = piece.kind == Kind::read ? abi::operation_read : abi::operation_write;
        submission.offset = piece.offset;
        submission.address = reinterpret_cast<std::uintptr_t>(piece.address);
        submission.size_bytes = static_cast<std::uint32_t>(piece.size_bytes);
        return submission;
    }

    // Whether the alarm was among them.
    bool take_completions(Ring& ring) {
        bool is_short_of_room = false;
        bool was_alarmed = false;
        while (const std::optional<abi::Completion> completion = ring.pop()) {
            if (completion->user_data == alarm_number) {
                was_alarmed = true;
                continue;
            }
            const auto slot = static_cast<std::uint32_t>(completion->user_data);
            is_short_of_room = is_short_of_room || completion->result == -EAGAIN;
            source_.ended(*std::exchange(pieces_[slot], std::nullopt), completion->result);
            free_.push_back(slot);
        }
        if (is_short_of_room) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        return was_alarmed;
    }

    PieceSource& source_;
    std::vector<std::optional<Piece>> pieces_;  // under way, by slot
    std::vector<std::uint32_t> free_;
    Alarm alarm_;
    std::atomic<bool> is_asleep_{false};
    std::atomic<bool> is_stopping_{false};
    std::thread thread_;
};

}  // namespace

std::unique_ptr<Mover> make_ring_mover(PieceSource& source, unsigned depth) {
    return std::make_unique<RingMover>(source, depth);
}

}  // namespace kvstore::io
