#include "socket_information.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "error.h"

namespace kvstore::net {
namespace {

// Byte offsets in `struct tcp_info` of linux/tcp.h, which only ever grows at its end. The header of the machine that
// builds may be older than the kernel that runs.
namespace offset {
constexpr std::size_t app_limited = 7;
constexpr std::size_t segment_bytes = 16;
constexpr std::size_t unacknowledged = 24;
constexpr std::size_t round_trip = 68;
constexpr std::size_t round_trip_variation = 72;
constexpr std::size_t window = 80;
constexpr std::size_t total_retransmits = 100;
constexpr std::size_t bytes_acknowledged = 120;
constexpr std::size_t segments_out = 136;
constexpr std::size_t not_sent = 144;
constexpr std::size_t round_trip_min = 148;
constexpr std::size_t delivery_rate = 160;
constexpr std::size_t busy = 168;
constexpr std::size_t receiver_limited = 176;
constexpr std::size_t buffer_limited = 184;
constexpr std::size_t bytes_sent = 200;
constexpr std::size_t bytes_retransmitted = 208;
constexpr std::size_t end = 216;
}  // namespace offset

static_assert(offsetof(tcp_info, tcpi_rtt) == offset::round_trip);
static_assert(offsetof(tcp_info, tcpi_total_retrans) == offset::total_retransmits);

class Fields {
  public:
    explicit Fields(int descriptor) {
        auto size = static_cast<socklen_t>(bytes_.size());
        if (::getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, bytes_.data(), &size) == 0) {
            size_ = size;
        } else if (errno == EBADF || errno == ENOTSOCK) {
            throw NetError(Fault::local, std::string("no open socket: ") + std::strerror(errno));
        }
    }
    template <typename Value>
    std::optional<std::uint64_t> get(std::size_t at) const {
        if (at + sizeof(Value) > size_) {
            return std::nullopt;
        }
        Value value;
        std::memcpy(&value, bytes_.data() + at, sizeof(value));
        return value;
    }
    std::optional<std::uint64_t> count(std::size_t at) const { return get<std::uint32_t>(at); }
    std::optional<std::uint64_t> bytes(std::size_t at) const { return get<std::uint64_t>(at); }
    static std::optional<double> seconds(std::optional<std::uint64_t> microseconds) {
        return microseconds ? std::optional<double>(static_cast<double>(*microseconds) / 1e6) : std::nullopt;
    }
    // A time that the kernel has not measured yet is 0, or the largest number.
    std::optional<double> measured_seconds(std::size_t at) const {
        const auto microseconds = count(at);
        const bool is_known = microseconds && *microseconds != 0 && *microseconds != UINT32_MAX;
        return is_known ? seconds(microseconds) : std::nullopt;
    }

  private:
    std::array<std::byte, offset::end> bytes_{};
    std::size_t size_ = 0;
};

std::optional<std::string> congestion_control(int descriptor) {
    std::array<char, 17> name{};  // TCP_CA_NAME_MAX and an end
    auto size = static_cast<socklen_t>(name.size() - 1);
    if (::getsockopt(descriptor, IPPROTO_TCP, TCP_CONGESTION, name.data(), &size) != 0) {
        return std::nullopt;
    }
    return std::string(name.data());
}

}  // namespace

SocketInformation read_socket_information(int descriptor) {
    const Fields fields(descriptor);
    SocketInformation found;
    found.round_trip_s = fields.measured_seconds(offset::round_trip);
    found.round_trip_variation_s = fields.measured_seconds(offset::round_trip_variation);
    found.round_trip_min_s = fields.measured_seconds(offset::round_trip_min);
    if (const auto rate = fields.bytes(offset::delivery_rate); rate && *rate != 0) {
        found.delivery_bytes_per_s = static_cast<double>(*rate);
        found.is_app_limited = (*fields.get<std::uint8_t>(offset::app_limited) & 1) != 0;
    }
    found.retransmits = fields.count(offset::total_retransmits);
    found.segments_sent = fields.count(offset::segments_out);
    found.sent_bytes = fields.bytes(offset::bytes_sent);
    found.acknowledged_bytes = fields.bytes(offset::bytes_acknowledged);
    found.retransmitted_bytes = fields.bytes(offset::bytes_retransmitted);
    found.window_segments = fields.count(offset::window);
    found.in_flight_segments = fields.count(offset::unacknowledged);
    found.segment_bytes = fields.count(offset::segment_bytes);
    found.unsent_bytes = fields.count(offset::not_sent);
    found.busy_s = Fields::seconds(fields.bytes(offset::busy));
    found.receiver_limited_s = Fields::seconds(fields.bytes(offset::receiver_limited));
    found.buffer_limited_s = Fields::seconds(fields.bytes(offset::buffer_limited));
    found.congestion_control = congestion_control(descriptor);
    return found;
}

std::optional<std::uint64_t> unacknowledged_bytes(int descriptor) {
    int count = 0;
    if (::ioctl(descriptor, SIOCOUTQ, &count) != 0 || count < 0) {
        return std::nullopt;
    }
    return static_cast<std::uint64_t>(count);
}

void set_patience(int descriptor, double progress_deadline_s) {
    const auto timeout_ms = static_cast<int>(std::min(std::ceil(progress_deadline_s * 1500), 1e9));
    // Refused by other kinds of sockets; the deadlines above this hold all the same.
    static_cast<void>(::setsockopt(descriptor, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof(timeout_ms)));
}

}  // namespace kvstore::net
