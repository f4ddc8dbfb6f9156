// The receiving loop of one connection: DATA frames from the socket straight into reserved records.
#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "arrivals.h"
#include "frame.h"
#include "stream.h"

namespace kvstore::net {

// Why the loop came back.
enum class Arrival {
    idle,      // no frame began within the linger
    stopped,   // `stop` was set
    control,   // the header of a frame that is not DATA of this attachment; its payload is unread
    progress,  // pieces arrived damaged, records became complete, or each frame is to be seen
    refused,   // a DATA frame breaks a rule; `unread_bytes` of it are left
    overdue,   // the transfer's deadline has passed at a frame; `unread_bytes` of it are left
};

struct ReceiveOrder {
    TransferId transfer;
    std::uint64_t generation = 0;
    Moment transfer_deadline;  // no frame may begin after it
    double linger_s = 0;       // how long to wait for a next frame before `idle`
    bool is_observed = false;  // come back after each frame
    bool is_verified = true;   // false only where it is measured what checksums cost: damage passes as data then
};

struct Received {
    Arrival event = Arrival::idle;
    HeaderBytes header{};            // control
    std::string reason;              // refused
    std::uint64_t unread_bytes = 0;  // refused, overdue
    Settled settled;                 // progress
    std::vector<PieceRow> rows;      // progress, when observed: the pieces of the frame
};

// Receives until there is something to tell. CREDIT leaves on `control`, which may be another connection of the
// transfer. REQUIRES: the wanted records stay in place during the call.
// Throws NetError: the stream is over, and what was on its way is wanted again.
Received receive_pieces(Stream& stream, Stream& control, Arrivals& arrivals, const ReceiveOrder& order,
                        const std::atomic<bool>& stop);

}  // namespace kvstore::net
