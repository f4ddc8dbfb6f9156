// Who may send next, when several transfers of one node have something to send.
//
// A transfer is a flow with a priority (0 first) and a peer. Before each frame a sending loop asks for a turn:
//
// - A flow waits while a more urgent one is at work, to whatever peer. One that its peer keeps waiting holds up nobody
//   who sends to another peer, and after a longer while nobody at all.
// - Together, those that wait for a more urgent flow get one byte in `floor_share`, shared evenly, whatever their
//   priorities: nothing starves.
// - Of flows of one priority to one peer none is ahead of another that is at work by more than `lead_bytes` and a frame
//   for each of its connections. To different peers each sends as fast as its peer takes it.
// - A flow without pieces or credit, or with a pace of its own, holds up nobody.
//
// A flow alone never takes the lock. Any thread may call anything.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "stream.h"

namespace kvstore::net {

struct TrafficRules {
    // A flow of which nothing has reached its peer for so long holds up nobody, of lower priority and of its own; nor
    // one that could hand over nothing for so long those to other peers.
    Clock::duration stalled_for_lower = std::chrono::milliseconds(500);
    Clock::duration stalled_for_equals = std::chrono::milliseconds(200);
    Clock::duration stalled_for_other_peers = std::chrono::milliseconds(10);
    // Nor does one whose peer takes less than this hold up those to other peers.
    std::uint64_t slow_bytes_per_s = 100'000'000;
    // Between two calls of its sending loop a flow that has more to send keeps its place.
    Clock::duration linger = std::chrono::milliseconds(20);
    std::uint64_t lead_bytes = 4U << 20;
    // While others are at work a turn ends after so much.
    std::uint64_t shared_frame_bytes = 1U << 20;
    std::uint64_t floor_share = 16;
    std::uint64_t floor_frame_bytes = 256U << 10;
    std::uint64_t floor_saved_bytes_max = 1U << 20;
    // What the kernel has taken is out of reach: it leaves before anything urgent that begins later, and the flow that
    // it belongs to is no longer seen to be at work. So while others are at work little is handed over ahead, and by a
    // background flow never much.
    std::uint32_t shared_unsent_bytes = 256U << 10;
    std::uint64_t background_frame_bytes = 512U << 10;
};

class Traffic {
  public:
    class Flow;
    class Seat;

    explicit Traffic(TrafficRules rules = {}) : rules_(rules) {}
    Traffic(const Traffic&) = delete;
    Traffic& operator=(const Traffic&) = delete;

  private:
    struct Peer {
        std::size_t flow_count = 0;
        // Of the survey under way
        unsigned most_urgent = 0;
        std::uint64_t least_served = 0;
    };
    void survey(Moment now);
    void remove(Flow& flow);

    const TrafficRules rules_;
    std::mutex lock_;
    std::map<std::string, Peer> peers_;
    std::vector<Flow*> active_;
    std::atomic<std::size_t> active_count_{0};
    std::int64_t floor_bytes_ = 0;
    bool is_anyone_held_ = false;
};

// One transfer. Its connections each take a seat while they send.
class Traffic::Flow {
  public:
    // A background flow leaves little in the kernel. A paced one waits for others and is waited for by nobody: what it
    // leaves over is theirs.
    Flow(std::shared_ptr<Traffic> traffic, std::uint8_t priority, bool is_background, bool is_paced,
         const std::string& peer);
    ~Flow();
    Flow(const Flow&) = delete;
    Flow& operator=(const Flow&) = delete;

  private:
    friend class Traffic;
    Moment handed_over(Moment now) const;
    Moment moved(Moment now);

    const std::shared_ptr<Traffic> traffic_;
    const unsigned priority_;
    const bool is_background_;
    const bool is_paced_;
    Peer* peer_;
    std::map<std::string, Peer>::iterator peer_entry_;
    // Below: guarded by the lock of `traffic_`.
    std::vector<Seat*> seats_;
    std::size_t waiting_count_ = 0;
    Moment left_;  // when the last seat was left, with more to send
    std::uint64_t served_bytes_ = 0;
    std::uint64_t floor_served_bytes_ = 0;
    bool is_slow_ = false;
    bool is_active_ = false;
    bool may_go_ = false;
    bool may_go_by_floor_ = false;
    std::condition_variable may_go_changed_;
};

// A sending loop that is at work for a flow, in one thread.
class Traffic::Seat {
  public:
    // `stream` shows that bytes move; without one only turns do. `unsent_bytes_max` bounds what waits in the kernel
    // without having been sent, as Stream::bound_unsent; while others are at work there is a bound in any case.
    Seat(Flow& flow, Stream* stream, std::uint32_t unsent_bytes_max = 0);
    ~Seat();
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;

    // Whether another flow is at work. Without, no turn is waited for.
    bool is_contended() const { return traffic_.active_count_.load(std::memory_order_acquire) > 1; }

    // Waits for a turn until a moment, or until `stop` was set, which is seen within 50 ms. How many bytes of
    // pieces the frame may hold; 0: no turn came.
    std::uint64_t wait_turn(std::uint64_t frame_bytes_max, Moment until, const std::atomic<bool>& stop);
    // The turn has ended: so many bytes were handed over.
    void sent(std::uint64_t size_bytes);
    // The loop ends with nothing to send. Otherwise it comes back soon, and the flow keeps its place for a while.
    void leave() { has_more_ = false; }

  private:
    friend class Traffic;
    // When bytes were last handed to the kernel; when they last left it for the peer's.
    Moment handed_over() const;
    Moment moved(Moment now);
    void take_place();
    void charge(std::uint64_t size_bytes);

    Traffic& traffic_;
    Flow& flow_;
    const Stream* const stream_;
    Moment began_;
    Moment probed_;
    Moment queue_moved_;
    std::uint64_t queued_bytes_ = 0;
    std::uint64_t charged_bytes_ = 0;
    bool is_charged_ = false;
    bool is_by_floor_ = false;
    bool has_more_ = true;
};

}  // namespace kvstore::net
