#include "stream.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "error.h"
#include "socket_information.h"

namespace kvstore::net {
namespace {

constexpr std::size_t parts_per_call_max = 1024;  // IOV_MAX of Linux
constexpr double wait_s_max = 86400.0;
constexpr double look_fraction = 0.2;  // of the no-progress deadline: how often a blocked sender looks for progress

std::string seconds_text(double seconds) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%g s", seconds);
    return text.data();
}

Clock::duration duration_of(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Milliseconds for poll, rounded up, so that a wait does not end just before its deadline.
int poll_timeout(Moment deadline) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    return static_cast<int>(std::clamp<decltype(left)>(left, 0, 60'000));
}

// True once one of `events` holds, or the stream has ended; false at the deadline.
bool wait_for(int fd, short events, Moment deadline) {
    while (true) {
        pollfd waiting{fd, events, 0};
        const int ready = ::poll(&waiting, 1, poll_timeout(deadline));
        if (ready > 0) {
            return true;
        }
        if (Clock::now() >= deadline) {
            return false;
        }
    }
}

void set_timeouts(int fd, double seconds) {
    const double whole = std::floor(seconds);
    timeval wait{};
    wait.tv_sec = static_cast<time_t>(whole);
    // A timeout of zero would mean for ever.
    wait.tv_usec = std::max<suseconds_t>(static_cast<suseconds_t>((seconds - whole) * 1e6), whole > 0 ? 0 : 1000);
    for (const int option : {SO_SNDTIMEO, SO_RCVTIMEO}) {
        if (::setsockopt(fd, SOL_SOCKET, option, &wait, sizeof(wait)) != 0) {
            throw NetError(Fault::local, std::string("a socket's timeout could not be set: ") + std::strerror(errno));
        }
    }
}

// Takes `moved` bytes off the front.
void advance(std::span<iovec>& parts, std::size_t moved) {
    while (!parts.empty() && moved >= parts.front().iov_len) {
        moved -= parts.front().iov_len;
        parts = parts.subspan(1);
    }
    if (moved != 0) {
        parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + moved;
        parts.front().iov_len -= moved;
    }
}

bool is_local(int error) {
    return error == ENOMEM || error == ENOBUFS || error == EFAULT || error == EINVAL;
}

}  // namespace

Moment moment_of(double monotonic_s) {
    constexpr double latest_s = 4e9;  // beyond any uptime, and far from overflow
    return Moment(duration_of(std::clamp(monotonic_s, 0.0, latest_s)));
}

double seconds_of(Moment moment) {
    return std::chrono::duration<double>(moment.time_since_epoch()).count();
}

// The number of a descriptor is not used again before the last call on it has left.
class Stream::Descriptor {
  public:
    explicit Descriptor(int number) : number_(number) {}
    ~Descriptor() { ::close(number_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int number() const { return number_; }

  private:
    const int number_;
};

// One thread sends at a time.
class Stream::Turn {
  public:
    explicit Turn(Stream& stream) : stream_(stream) {
        const double patience_s = stream.progress_deadline_s();
        std::unique_lock lock(stream.turn_lock_);
        if (!stream.turn_ended_.wait_for(lock, duration_of(patience_s), [&] { return !stream.is_sending_; })) {
            throw NetError(Fault::peer_gone, stream.peer_address_ + " took no bytes for " + seconds_text(patience_s));
        }
        stream.is_sending_ = true;
    }
    ~Turn() {
        {
            const std::scoped_lock lock(stream_.turn_lock_);
            stream_.is_sending_ = false;
        }
        stream_.turn_ended_.notify_one();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

  private:
    Stream& stream_;
};

Stream::Stream(int descriptor, std::string peer_address, double progress_deadline_s)
    : peer_address_(std::move(peer_address)),
      last_sent_(Clock::now().time_since_epoch().count()),
      last_received_(last_sent_.load()),
      descriptor_(std::make_shared<Descriptor>(descriptor)) {
    set_progress_deadline_s(progress_deadline_s);
}

Stream::~Stream() = default;

void Stream::set_progress_deadline_s(double seconds) {
    const double bounded = std::clamp(seconds, 0.001, wait_s_max);
    set_timeouts(descriptor()->number(), bounded * look_fraction);
    set_patience(descriptor()->number(), bounded);
    progress_deadline_s_.store(bounded, std::memory_order_relaxed);
}

std::shared_ptr<Stream::Descriptor> Stream::descriptor() const {
    const std::scoped_lock lock(descriptor_lock_);
    if (descriptor_ == nullptr) {
        throw NetError(Fault::peer_gone,
                       "the connection to " + peer_address_ + " was closed by this side; connect again");
    }
    return descriptor_;
}

void Stream::close() {
    const std::scoped_lock lock(descriptor_lock_);
    if (descriptor_ != nullptr) {
        // Wakes the calls that wait in the kernel; refused if the peer has reset the connection, and then none waits.
        ::shutdown(descriptor_->number(), SHUT_RDWR);
        descriptor_.reset();
    }
}

void Stream::broken(const char* doing, int error) {
    descriptor();  // says so if this side has closed it
    const std::string where = "the connection to " + peer_address_;
    if (is_local(error)) {
        throw NetError(Fault::local, std::string(doing) + " failed on " + where + ": " + std::strerror(error));
    }
    throw NetError(Fault::peer_gone, where + " broke while " + doing + ": " + std::strerror(error) +
                                         "; the peer has ended, or the network between has");
}

void Stream::ended() {
    descriptor();
    throw NetError(Fault::peer_gone, peer_address_ + " closed the connection");
}

void Stream::send(std::span<iovec> parts) {
    const Turn turn(*this);
    const std::shared_ptr<Descriptor> descriptor = this->descriptor();
    try {
        while (!parts.empty()) {
            send_slice(descriptor->number(), parts);
            last_sent_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
        }
    } catch (...) {
        close();
        throw;
    }
}

void Stream::send_slice(int fd, std::span<iovec>& parts) {
    // The slice is cut out of the vector, and the rest of the part that it ends in is put back.
    std::size_t count = 0;
    std::size_t slice = 0;
    std::size_t cut = 0;
    while (count < parts.size() && count < parts_per_call_max && slice < slice_bytes) {
        const std::size_t length = parts[count].iov_len;
        const std::size_t taken = std::min(length, slice_bytes - slice);
        cut = length - taken;
        slice += taken;
        ++count;
    }
    iovec& last = parts[count - 1];
    last.iov_len -= cut;
    std::span<iovec> left = parts.first(count);
    Moment looked = Clock::now();
    Moment end = looked + duration_of(progress_deadline_s());
    std::uint64_t waiting = unacknowledged_bytes(fd).value_or(0);
    int flags = MSG_NOSIGNAL;
    while (!left.empty() && slice != 0) {
        msghdr message{};
        message.msg_iov = left.data();
        message.msg_iovlen = left.size();
        const ssize_t sent = ::sendmsg(fd, &message, flags);
        if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            broken("sending", errno);
        }
        if (sent > 0) {
            slice -= static_cast<std::size_t>(sent);
            waiting += static_cast<std::uint64_t>(sent);
            advance(left, static_cast<std::size_t>(sent));
        }
        if (slice == 0) {
            break;
        }
        // The kernel waited in vain, or a signal came: from here on the waits end with the slice's time.
        flags |= MSG_DONTWAIT;
        const Moment step = Clock::now() + duration_of(progress_deadline_s() * look_fraction);
        if (wait_for(fd, POLLOUT, std::min(step, end))) {
            continue;
        }
        descriptor();
        // The kernel takes more only when a third of its buffer is free. While what it has is being acknowledged, as
        // after a pause of the network, the peer is there.
        const std::uint64_t still_waiting = unacknowledged_bytes(fd).value_or(waiting);
        const Moment now = Clock::now();
        if (still_waiting < waiting) {
            waiting = still_waiting;
            end = looked + duration_of(progress_deadline_s());
        } else if (now >= end) {
            throw NetError(Fault::peer_gone, peer_address_ + " took no bytes for " +
                                                 seconds_text(progress_deadline_s()) +
                                                 "; it is stopped, or the network between is cut or too slow");
        }
        looked = now;
    }
    if (cut != 0) {
        last.iov_base = static_cast<std::byte*>(last.iov_base) + last.iov_len;
        last.iov_len = cut;
        parts = parts.subspan(count - 1);
    } else {
        parts = parts.subspan(count);
    }
}

void Stream::bound_unsent(std::uint32_t size_bytes) {
    const std::uint32_t before = unsent_bytes_.exchange(size_bytes, std::memory_order_relaxed);
    if (before == size_bytes) {
        return;
    }
    const std::scoped_lock lock(descriptor_lock_);
    if (descriptor_ == nullptr) {
        return;
    }
    const int fd = descriptor_->number();
    std::uint32_t at_first = unsent_bytes_at_first_.load(std::memory_order_relaxed);
    if (before == 0) {
        socklen_t length = sizeof(at_first);
        if (::getsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &at_first, &length) != 0) {
            return;  // Not TCP: what is urgent waits behind a little more.
        }
        unsent_bytes_at_first_.store(at_first, std::memory_order_relaxed);
    }
    const std::uint32_t wanted = size_bytes == 0 || (at_first != 0 && at_first < size_bytes) ? at_first : size_bytes;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &wanted, sizeof(wanted));
}

std::uint64_t Stream::queued_bytes() const {
    const std::scoped_lock lock(descriptor_lock_);
    return descriptor_ == nullptr ? 0 : unacknowledged_bytes(descriptor_->number()).value_or(0);
}

bool Stream::wait_readable(Moment deadline) {
    return wait_for(descriptor()->number(), POLLIN, deadline);
}

bool Stream::is_connected() const {
    const std::scoped_lock lock(descriptor_lock_);
    if (descriptor_ == nullptr) {
        return false;
    }
    pollfd asked{descriptor_->number(), POLLRDHUP, 0};
    return ::poll(&asked, 1, 0) == 0;
}

HeaderBytes Stream::receive_header(Moment deadline) {
    const std::shared_ptr<Descriptor> descriptor = this->descriptor();
    HeaderBytes bytes;
    std::size_t filled = 0;
    while (true) {
        const ssize_t received =
            ::recv(descriptor->number(), bytes.data() + filled, bytes.size() - filled, MSG_DONTWAIT);
        if (received == 0) {
            ended();
        }
        if (received < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            broken("receiving", errno);
        }
        filled += static_cast<std::size_t>(std::max<ssize_t>(received, 0));
        if (filled == bytes.size()) {
            note_received();
            return bytes;
        }
        if (!wait_for(descriptor->number(), POLLIN, deadline)) {
            if (filled != 0) {
                // What follows could not be told apart any more.
                close();
            }
            throw NetError(Fault::deadline, std::to_string(bytes.size() - filled) + " of " +
                                                std::to_string(bytes.size()) + " bytes did not come from " +
                                                peer_address_ + " in time");
        }
    }
}

void Stream::receive(void* into, std::size_t size_bytes) {
    SliceClock slices(*this);
    auto* next = static_cast<std::byte*>(into);
    while (size_bytes != 0) {
        iovec part{next, size_bytes};
        const std::size_t received = slices.receive_some({&part, 1});
        next += received;
        size_bytes -= received;
    }
}

SliceClock::SliceClock(Stream& stream) : stream_(stream), descriptor_(stream.descriptor()) {
    begin_slice();
}

void SliceClock::begin_slice() {
    slice_left_ = slice_bytes;
    slice_end_ = Clock::now() + duration_of(stream_.progress_deadline_s());
}

std::size_t SliceClock::receive_some(std::span<iovec> parts) {
    while (true) {
        msghdr message{};
        message.msg_iov = parts.data();
        message.msg_iovlen = parts.size();
        const ssize_t received = ::recvmsg(descriptor_->number(), &message, 0);
        if (received > 0) {
            stream_.note_received();
            const auto moved = static_cast<std::size_t>(received);
            slice_left_ -= std::min(moved, slice_left_);
            if (slice_left_ == 0) {
                begin_slice();
            } else if (Clock::now() >= slice_end_) {
                break;
            }
            return moved;
        }
        if (received == 0) {
            stream_.ended();
        }
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            stream_.broken("receiving", errno);
        }
        if (Clock::now() >= slice_end_) {
            break;
        }
    }
    const double waited_s = stream_.progress_deadline_s();
    stream_.close();
    throw NetError(Fault::peer_gone,
                   stream_.peer_address() + " stopped in the middle of a frame for " + seconds_text(waited_s));
}

}  // namespace kvstore::net
