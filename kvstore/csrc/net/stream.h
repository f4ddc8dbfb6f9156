// One connected stream socket: vectored I/O with deadlines. Waits are the kernel's.
//
// One thread receives; any thread may send, a whole frame at a time; any thread may close, which ends their waits.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "frame.h"

namespace kvstore::net {

// CLOCK_MONOTONIC, as Python's time.monotonic(): moments can be passed between the two.
using Clock = std::chrono::steady_clock;
using Moment = Clock::time_point;

Moment moment_of(double monotonic_s);
double seconds_of(Moment moment);

class Stream {
  public:
    // Owns `descriptor`, a connected stream socket. `peer_address` is for messages.
    Stream(int descriptor, std::string peer_address, double progress_deadline_s);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    const std::string& peer_address() const { return peer_address_; }
    // The longest that one slice may take.
    double progress_deadline_s() const { return progress_deadline_s_.load(std::memory_order_relaxed); }
    void set_progress_deadline_s(double seconds);
    Moment last_sent() const { return Moment(Clock::duration(last_sent_.load(std::memory_order_relaxed))); }
    Moment last_received() const { return Moment(Clock::duration(last_received_.load(std::memory_order_relaxed))); }

    // Sends all bytes, as one unit among the threads that send. `parts` is used up.
    // Throws NetError(peer_gone, local); the stream is closed then, since a frame may be cut in two.
    void send(std::span<iovec> parts);

    // How many bytes may wait in the kernel without having been sent; 0 is what the connection began with. Bytes in
    // flight do not count. Without effect on sockets that are not TCP, and on those that keep less by themselves.
    void bound_unsent(std::uint32_t size_bytes);

    // Bytes that were handed over and not acknowledged by the peer's kernel; 0 once it is closed.
    std::uint64_t queued_bytes() const;

    // True once there is something to receive, or the stream has ended; false at the deadline.
    bool wait_readable(Moment deadline);

    // False once this side or the peer has ended the connection, or it broke, as far as the kernel knows by now.
    bool is_connected() const;

    // The bytes of a header. Throws NetError(deadline) when not a byte came in time, and peer_gone.
    HeaderBytes receive_header(Moment deadline);

    // Fills all of it; each slice has the no-progress deadline. Throws NetError(peer_gone, local).
    void receive(void* into, std::size_t size_bytes);

    // DATA frames that have arrived whole: what a peer is told when the connection breaks.
    std::uint64_t frames_arrived() const { return frames_arrived_.load(std::memory_order_acquire); }
    void count_frame() { frames_arrived_.fetch_add(1, std::memory_order_release); }

    // Ends the connection and every wait on it. Idempotent.
    void close();

  private:
    friend class SliceClock;
    class Descriptor;
    class Turn;
    std::shared_ptr<Descriptor> descriptor() const;
    [[noreturn]] void broken(const char* doing, int error);
    [[noreturn]] void ended();
    void note_received() { last_received_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed); }
    void send_slice(int fd, std::span<iovec>& parts);

    const std::string peer_address_;
    std::atomic<double> progress_deadline_s_{0};
    std::atomic<Clock::rep> last_sent_;
    std::atomic<Clock::rep> last_received_;
    std::atomic<std::uint64_t> frames_arrived_{0};
    std::atomic<std::uint32_t> unsent_bytes_{0};
    std::atomic<std::uint32_t> unsent_bytes_at_first_{0};
    // Not a timed mutex: thread sanitizers do not follow one.
    std::mutex turn_lock_;
    std::condition_variable turn_ended_;
    bool is_sending_ = false;
    mutable std::mutex descriptor_lock_;
    std::shared_ptr<Descriptor> descriptor_;
};

// Receives parts of one frame's payload, and bounds how long each slice of it may take.
class SliceClock {
  public:
    explicit SliceClock(Stream& stream);

    // Receives at least a byte, at most what the parts hold; the number of bytes.
    // Throws NetError(peer_gone, local).
    std::size_t receive_some(std::span<iovec> parts);

  private:
    void begin_slice();

    Stream& stream_;
    std::shared_ptr<Stream::Descriptor> descriptor_;
    Moment slice_end_;
    std::size_t slice_left_ = 0;
};

}  // namespace kvstore::net
