// The sending loop of one connection: DATA frames from records straight to the socket.
#pragma once

#include <atomic>
#include <cstdint>

#include "departures.h"
#include "frame.h"
#include "stream.h"
#include "traffic.h"

namespace kvstore::net {

struct SendOrder {
    TransferId transfer;
    std::uint64_t generation = 0;
    std::uint64_t frame_bytes_max = 0;
    std::uint32_t unsent_bytes_max = 0;  // that may wait in the kernel; 0 leaves it to the kernel
    std::uint32_t connection = 0;  // 0 is the first one of the attachment
    Moment until;                  // no frame begins after it
    bool is_observed = false;      // come back after each frame
};

struct Sent {
    std::uint64_t frames = 0;
    Moment first_frame;  // when the first frame of this call had left; with `frames` > 0 only
    Departing last;      // when observed: the frame
    bool is_held = false;  // it was not this flow's turn until the end
};

// Sends frames until nothing can be sent, `stop` is set, or it is time. REQUIRES: the records stay in place.
// Throws NetError: the stream is over.
Sent send_pieces(Stream& stream, Departures& departures, Traffic::Flow& flow, const SendOrder& order,
                 const std::atomic<bool>& stop);

}  // namespace kvstore::net
