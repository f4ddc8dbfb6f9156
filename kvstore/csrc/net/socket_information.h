// What the kernel knows of a TCP connection, and how patient it is with one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace kvstore::net {

// Of TCP_INFO and TCP_CONGESTION. What the kernel does not say (an older one gives less; other sockets nothing) is
// absent. Bytes and segments count from the connection's beginning; so do the times.
struct SocketInformation {
    std::optional<double> round_trip_s;
    std::optional<double> round_trip_variation_s;
    std::optional<double> round_trip_min_s;
    std::optional<double> delivery_bytes_per_s;  // as last measured while the sender kept it busy, or higher
    std::optional<bool> is_app_limited;          // that measurement was made while the sender had nothing to send
    std::optional<std::uint64_t> retransmits;
    std::optional<std::uint64_t> segments_sent;
    std::optional<std::uint64_t> sent_bytes;           // retransmitted ones included
    std::optional<std::uint64_t> acknowledged_bytes;
    std::optional<std::uint64_t> retransmitted_bytes;
    std::optional<std::uint64_t> window_segments;      // the congestion window
    std::optional<std::uint64_t> in_flight_segments;   // sent and not acknowledged
    std::optional<std::uint64_t> segment_bytes;
    std::optional<std::uint64_t> unsent_bytes;         // given to the kernel and never sent
    std::optional<double> busy_s;                      // there was something to send or to be acknowledged
    std::optional<double> receiver_limited_s;          // of these, waiting for the receiver's window
    std::optional<double> buffer_limited_s;            // of these, waiting for room in this side's send buffer
    std::optional<std::string> congestion_control;
};

// Throws NetError(local): no open socket.
SocketInformation read_socket_information(int descriptor);

// Bytes that were given to the kernel and not acknowledged by the peer; absent on sockets without such a count.
std::optional<std::uint64_t> unacknowledged_bytes(int descriptor);

// How long a TCP connection may go without an acknowledgement, so that it ends not long after the user's own deadline
// would have ended it. Does nothing on other sockets.
void set_patience(int descriptor, double progress_deadline_s);

}  // namespace kvstore::net
