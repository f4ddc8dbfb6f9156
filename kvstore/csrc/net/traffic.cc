#include "traffic.h"

#include <algorithm>
#include <utility>

namespace kvstore::net {
namespace {

using std::chrono::milliseconds;

constexpr unsigned nobody = 256;  // less urgent than any priority
// What time alone changes is seen by one waiter at least this often; each of many looks less often.
constexpr auto poll = milliseconds(10);
constexpr std::size_t polls_max = 5;
constexpr auto probe_after = milliseconds(10);
// Fewer bytes say nothing about how fast a peer takes them.
constexpr std::uint64_t measured_bytes_min = 64U << 10;

}  // namespace

Traffic::Flow::Flow(std::shared_ptr<Traffic> traffic, std::uint8_t priority, bool is_background, bool is_paced,
                    const std::string& peer)
    : traffic_(std::move(traffic)), priority_(priority), is_background_(is_background), is_paced_(is_paced) {
    const std::scoped_lock lock(traffic_->lock_);
    peer_entry_ = traffic_->peers_.try_emplace(peer).first;
    peer_ = &peer_entry_->second;
    peer_->flow_count += 1;
}

Traffic::Flow::~Flow() {
    const std::scoped_lock lock(traffic_->lock_);
    if (is_active_) {
        traffic_->remove(*this);
        traffic_->survey(Clock::now());
    }
    if (--peer_->flow_count == 0) {
        traffic_->peers_.erase(peer_entry_);
    }
}

Moment Traffic::Flow::handed_over(Moment now) const {
    if (waiting_count_ != 0) {
        return now;
    }
    Moment latest = left_;
    for (const Seat* seat : seats_) {
        latest = std::max(latest, seat->handed_over());
    }
    return latest;
}

Moment Traffic::Flow::moved(Moment now) {
    Moment latest = handed_over(now);
    // The kernel is asked only about those that it keeps waiting.
    for (Seat* seat : seats_) {
        if (now - latest < probe_after) {
            break;
        }
        latest = std::max(latest, seat->moved(now));
    }
    return latest;
}

void Traffic::remove(Flow& flow) {
    flow.is_active_ = false;
    std::erase(active_, &flow);
    active_count_.store(active_.size(), std::memory_order_release);
}

// Decides for every waiting flow whether it may go, and wakes those that may.
void Traffic::survey(Moment now) {
    std::erase_if(active_, [&](Flow* flow) {
        const bool has_left = flow->seats_.empty() && now - flow->left_ >= rules_.linger;
        flow->is_active_ = !has_left;
        return has_left;
    });
    active_count_.store(active_.size(), std::memory_order_release);
    for (const Flow* flow : active_) {
        flow->peer_->most_urgent = nobody;
    }
    unsigned most_urgent = nobody;
    for (Flow* flow : active_) {
        if (flow->is_paced_) {
            continue;
        }
        if (now - flow->handed_over(now) < rules_.stalled_for_other_peers && !flow->is_slow_) {
            most_urgent = std::min(most_urgent, flow->priority_);
        }
        const Clock::duration silence = now - flow->moved(now);
        if (silence >= rules_.stalled_for_lower) {
            continue;
        }
        Peer& peer = *flow->peer_;
        if (flow->priority_ < peer.most_urgent) {
            peer.most_urgent = flow->priority_;
            peer.least_served = ~std::uint64_t{0};
        }
        if (flow->priority_ == peer.most_urgent && silence < rules_.stalled_for_equals) {
            peer.least_served = std::min(peer.least_served, flow->served_bytes_);
        }
    }
    Flow* next_by_floor = nullptr;
    is_anyone_held_ = false;
    for (Flow* flow : active_) {
        flow->may_go_by_floor_ = false;
        flow->may_go_ = false;
        if (flow->waiting_count_ == 0) {
            continue;
        }
        if (flow->priority_ <= std::min(most_urgent, flow->peer_->most_urgent)) {
            const std::uint64_t least = flow->peer_->least_served;
            const bool is_equal = flow->priority_ == flow->peer_->most_urgent && flow->served_bytes_ > least;
            flow->may_go_ = !is_equal || flow->served_bytes_ - least <= rules_.lead_bytes;
        } else {
            is_anyone_held_ = true;
            if (floor_bytes_ > 0 &&
                (next_by_floor == nullptr || flow->floor_served_bytes_ < next_by_floor->floor_served_bytes_)) {
                next_by_floor = flow;
            }
        }
        if (flow->may_go_) {
            flow->may_go_changed_.notify_all();
        }
    }
    if (next_by_floor != nullptr) {
        next_by_floor->may_go_ = next_by_floor->may_go_by_floor_ = true;
        next_by_floor->may_go_changed_.notify_all();
    }
}

Traffic::Seat::Seat(Flow& flow, Stream* stream, std::uint32_t unsent_bytes_max)
    : traffic_(*flow.traffic_), flow_(flow), stream_(stream), began_(Clock::now()) {
    take_place();
    if (stream != nullptr) {
        const std::uint32_t shared = traffic_.rules_.shared_unsent_bytes;
        if (flow.is_background_ || is_contended()) {
            unsent_bytes_max = unsent_bytes_max == 0 ? shared : std::min(unsent_bytes_max, shared);
        }
        stream->bound_unsent(unsent_bytes_max);
    }
}

void Traffic::Seat::take_place() {
    const std::scoped_lock lock(traffic_.lock_);
    flow_.seats_.push_back(this);
    if (flow_.is_active_) {
        return;
    }
    // What was not used while it had nothing to send is no claim on the others.
    std::uint64_t least_served = ~std::uint64_t{0};
    std::uint64_t least_by_floor = ~std::uint64_t{0};
    for (const Flow* other : traffic_.active_) {
        least_by_floor = std::min(least_by_floor, other->floor_served_bytes_);
        if (other->peer_ == flow_.peer_ && other->priority_ == flow_.priority_) {
            least_served = std::min(least_served, other->served_bytes_);
        }
    }
    if (least_served != ~std::uint64_t{0}) {
        flow_.served_bytes_ = std::max(flow_.served_bytes_, least_served);
    }
    if (!traffic_.active_.empty()) {
        flow_.floor_served_bytes_ = std::max(flow_.floor_served_bytes_, least_by_floor);
    }
    flow_.is_active_ = true;
    traffic_.active_.push_back(&flow_);
    traffic_.active_count_.store(traffic_.active_.size(), std::memory_order_release);
}

Traffic::Seat::~Seat() {
    const std::scoped_lock lock(traffic_.lock_);
    std::erase(flow_.seats_, this);
    charge(0);
    if (!flow_.seats_.empty()) {
        return;
    }
    if (has_more_) {
        flow_.left_ = Clock::now();
        return;
    }
    traffic_.remove(flow_);
    if (!traffic_.active_.empty()) {
        traffic_.survey(Clock::now());
    }
}

Moment Traffic::Seat::handed_over() const {
    return stream_ == nullptr ? began_ : std::max(began_, stream_->last_sent());
}

Moment Traffic::Seat::moved(Moment now) {
    if (stream_ == nullptr) {
        return began_;
    }
    if (now - probed_ >= probe_after) {
        probed_ = now;
        if (const std::uint64_t queued = stream_->queued_bytes(); queued != queued_bytes_) {
            queued_bytes_ = queued;
            queue_moved_ = now;
        }
    }
    return std::max(handed_over(), queue_moved_);
}

std::uint64_t Traffic::Seat::wait_turn(std::uint64_t frame_bytes_max, Moment until, const std::atomic<bool>& stop) {
    const TrafficRules& rules = traffic_.rules_;
    std::uint64_t room = frame_bytes_max;
    if (flow_.is_background_) {
        room = std::min(room, rules.background_frame_bytes);
    }
    if (!is_contended()) {
        return room;
    }
    room = std::min(room, rules.shared_frame_bytes);
    std::unique_lock lock(traffic_.lock_);
    flow_.waiting_count_ += 1;
    Moment now = Clock::now();
    traffic_.survey(now);
    while (!flow_.may_go_ && now < until && !stop.load(std::memory_order_acquire)) {
        const auto patience = poll * static_cast<int>(std::min(traffic_.active_.size(), polls_max));
        flow_.may_go_changed_.wait_until(lock, std::min<Moment>(until, now + patience));
        now = Clock::now();
        traffic_.survey(now);
    }
    flow_.waiting_count_ -= 1;
    if (!flow_.may_go_) {
        return 0;
    }
    began_ = now;
    is_charged_ = true;
    is_by_floor_ = flow_.may_go_by_floor_;
    if (is_by_floor_) {
        room = std::min(room, rules.floor_frame_bytes);
        traffic_.floor_bytes_ -= static_cast<std::int64_t>(room);
        flow_.floor_served_bytes_ += room;
    } else {
        flow_.served_bytes_ += room;
    }
    charged_bytes_ = room;
    return room;
}

// Replaces what a turn was charged by what it has carried: less, or more where one piece is larger than a frame.
void Traffic::Seat::charge(std::uint64_t size_bytes) {
    if (!is_charged_) {
        return;
    }
    is_charged_ = false;
    if (is_by_floor_) {
        traffic_.floor_bytes_ += static_cast<std::int64_t>(charged_bytes_) - static_cast<std::int64_t>(size_bytes);
        flow_.floor_served_bytes_ += size_bytes - charged_bytes_;
        return;
    }
    flow_.served_bytes_ += size_bytes - charged_bytes_;
    if (traffic_.is_anyone_held_) {
        const auto saved = static_cast<std::int64_t>(size_bytes / (traffic_.rules_.floor_share - 1));
        const auto most = static_cast<std::int64_t>(traffic_.rules_.floor_saved_bytes_max);
        traffic_.floor_bytes_ = std::min(traffic_.floor_bytes_ + saved, most);
    }
}

void Traffic::Seat::sent(std::uint64_t size_bytes) {
    if (!is_charged_) {
        return;  // It was alone when the turn began.
    }
    const std::scoped_lock lock(traffic_.lock_);
    charge(size_bytes);
    const Moment now = Clock::now();
    if (size_bytes >= measured_bytes_min) {
        const double seconds = std::chrono::duration<double>(now - began_).count();
        const auto slow_bytes_per_s = static_cast<double>(traffic_.rules_.slow_bytes_per_s);
        flow_.is_slow_ = static_cast<double>(size_bytes) < seconds * slow_bytes_per_s;
    }
    began_ = now;
    traffic_.survey(now);
}

}  // namespace kvstore::net
