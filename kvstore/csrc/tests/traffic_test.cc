// Turns of transfers that share a sender: urgent ones first, even among equals, nobody held up by a slow peer, and
// nothing waits for ever (run with a thread sanitizer, too).
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <iostream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../net/traffic.h"
#include "check.h"

using namespace kvstore::net;
using kvstore::testing::check;
using std::chrono::milliseconds;

namespace {

constexpr std::uint64_t kib = 1U << 10;
constexpr std::uint64_t mib = 1U << 20;
constexpr auto patience = std::chrono::seconds(20);
constexpr auto moment = milliseconds(50);

const std::atomic<bool> never{false};

// Nothing but a turn changes anything.
TrafficRules patient_rules() {
    TrafficRules rules;
    rules.stalled_for_lower = rules.stalled_for_equals = rules.stalled_for_other_peers = std::chrono::hours(1);
    rules.slow_bytes_per_s = 0;
    return rules;
}

std::uint64_t turn(Traffic::Seat& seat, std::uint64_t frame_bytes, Clock::duration within = patience) {
    return seat.wait_turn(frame_bytes, Clock::now() + within, never);
}

void a_flow_alone_never_waits() {
    const auto traffic = std::make_shared<Traffic>();
    Traffic::Flow flow(traffic, 255, false, false, "a");
    Traffic::Seat seat(flow, nullptr);
    Traffic::Seat second(flow, nullptr);
    check(!seat.is_contended(), "connections of one flow are no others");
    check(seat.wait_turn(4 * mib, Clock::now(), never) == 4 * mib, "a whole frame, at once");
    seat.sent(4 * mib);
    Traffic::Flow background(traffic, 255, true, false, "a");
    {
        Traffic::Seat other(background, nullptr);
        check(other.is_contended(), "two flows are at work");
        other.leave();
    }
    check(!seat.is_contended(), "one has left");
    seat.leave();
}

void a_background_flow_sends_little_at_once() {
    const auto traffic = std::make_shared<Traffic>();
    Traffic::Flow flow(traffic, 255, true, false, "a");
    Traffic::Seat seat(flow, nullptr);
    check(turn(seat, 4 * mib) == TrafficRules{}.background_frame_bytes, "a small frame");
}

// A loop that sends until it is told to end. Totals are of finished turns.
void pour(Traffic::Flow& flow, std::uint64_t frame_bytes, std::atomic<std::uint64_t>& total,
          const std::atomic<bool>& is_over, unsigned seed) {
    std::mt19937 random(seed);
    Traffic::Seat seat(flow, nullptr);
    while (!is_over.load()) {
        const std::uint64_t room = seat.wait_turn(frame_bytes, Clock::now() + milliseconds(50), is_over);
        if (room == 0) {
            continue;
        }
        if (random() % 4 == 0) {
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
        }
        seat.sent(room);
        total.fetch_add(room);
    }
    seat.leave();
}

void equals_advance_together() {
    TrafficRules rules = patient_rules();
    rules.lead_bytes = 1 * mib;
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow many(traffic, 7, false, false, "a");
    Traffic::Flow one(traffic, 7, false, false, "a");
    std::atomic<std::uint64_t> by_many{0};
    std::atomic<std::uint64_t> by_one{0};
    std::atomic<bool> is_over{false};
    constexpr std::uint64_t frame_bytes = 256 * kib;
    // At work from before the first to after the last look.
    Traffic::Seat many_stays(many, nullptr);
    Traffic::Seat one_stays(one, nullptr);
    {
        std::vector<std::jthread> threads;
        for (unsigned seed = 0; seed < 3; ++seed) {
            threads.emplace_back([&, seed] { pour(many, frame_bytes, by_many, is_over, seed); });
        }
        threads.emplace_back([&] { pour(one, frame_bytes, by_one, is_over, 9); });
        // A lead and a frame for each connection, and those that finished between the two looks at the totals.
        const std::uint64_t bound = rules.lead_bytes + 3 * frame_bytes;
        const Moment end = Clock::now() + patience;
        while (by_one.load() < 64 * mib && Clock::now() < end) {
            const std::uint64_t one_before = by_one.load();
            const std::uint64_t many_between = by_many.load();
            const std::uint64_t one_after = by_one.load();
            // Of what is finished on one side, at most one frame of it was charged and unfinished on the other.
            check(many_between <= one_after + frame_bytes + bound, "the flow of many connections ran ahead");
            check(one_before <= many_between + 3 * frame_bytes + bound, "the flow of one connection ran ahead");
        }
        is_over = true;
    }
    check(by_one.load() >= 64 * mib, "both advance");
}

void urgent_flows_go_first_and_nothing_starves() {
    const TrafficRules rules = patient_rules();
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow urgent(traffic, 0, false, false, "a");
    Traffic::Flow normal(traffic, 128, false, false, "a");
    Traffic::Flow background(traffic, 255, true, false, "b");
    std::atomic<std::uint64_t> by_normal{0};
    std::atomic<std::uint64_t> by_background{0};
    std::atomic<bool> is_over{false};
    Traffic::Seat seat(urgent, nullptr);
    std::uint64_t by_urgent = 0;
    {
        std::jthread first([&] { pour(normal, 4 * mib, by_normal, is_over, 1); });
        std::jthread second([&] { pour(background, 4 * mib, by_background, is_over, 2); });
        const Moment end = Clock::now() + patience;
        while ((by_normal.load() < 2 * mib || by_background.load() < 2 * mib) && Clock::now() < end) {
            check(turn(seat, mib) == mib, "what is most urgent does not wait");
            by_urgent += mib;
            seat.sent(mib);
            const std::uint64_t others = by_normal.load() + by_background.load();
            check(others <= by_urgent / (rules.floor_share - 1) + rules.floor_frame_bytes,
                  "those that wait get their share and no more");
            std::this_thread::yield();
        }
        is_over = true;
    }
    check(by_normal.load() >= 2 * mib && by_background.load() >= 2 * mib, "nothing starves, whatever its priority");
}

void what_an_urgent_flow_does_not_use_is_free() {
    const auto traffic = std::make_shared<Traffic>(patient_rules());
    Traffic::Flow urgent(traffic, 0, false, false, "a");
    Traffic::Flow low(traffic, 9, false, false, "a");
    Traffic::Seat waiting(low, nullptr);
    {
        Traffic::Seat seat(urgent, nullptr);
        check(turn(seat, mib) == mib, "urgent");
        check(turn(waiting, mib, moment) == 0, "the other waits, within bounds");
        seat.sent(mib);
        seat.leave();
    }
    check(waiting.wait_turn(mib, Clock::now(), never) == mib, "nothing is left to wait for");
}

void a_flow_between_two_calls_keeps_its_place() {
    TrafficRules rules = patient_rules();
    rules.linger = std::chrono::hours(1);
    const auto traffic = std::make_shared<Traffic>(rules);
    auto urgent = std::make_unique<Traffic::Flow>(traffic, std::uint8_t{0}, false, false, "a");
    Traffic::Flow low(traffic, 9, false, false, "a");
    Traffic::Seat waiting(low, nullptr);
    { const Traffic::Seat seat(*urgent, nullptr); }
    check(turn(waiting, mib, moment) == 0, "it comes back");
    std::jthread later([&] {
        std::this_thread::sleep_for(moment);
        urgent.reset();
    });
    check(turn(waiting, mib) == mib, "it has ended");
}

void a_place_is_not_kept_for_long() {
    TrafficRules rules = patient_rules();
    rules.linger = milliseconds(1);
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow urgent(traffic, 0, false, false, "a");
    Traffic::Flow low(traffic, 9, false, false, "a");
    Traffic::Seat waiting(low, nullptr);
    { const Traffic::Seat seat(urgent, nullptr); }
    check(turn(waiting, mib) == mib, "nobody came back");
}

void a_peer_that_takes_nothing_holds_up_nobody_else() {
    TrafficRules rules = patient_rules();
    rules.stalled_for_other_peers = milliseconds(5);
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow urgent(traffic, 0, false, false, "slow");
    Traffic::Flow beside(traffic, 9, false, false, "other");
    Traffic::Flow behind(traffic, 9, false, false, "slow");
    Traffic::Seat stuck(urgent, nullptr);
    Traffic::Seat free(beside, nullptr);
    Traffic::Seat held(behind, nullptr);
    check(turn(stuck, mib) == mib, "urgent; it never ends");
    check(turn(free, mib) == mib, "to another peer");
    free.sent(mib);
    check(turn(held, mib, moment) == 0, "to the same peer");
}

void a_flow_that_its_peer_stopped_holds_up_nobody() {
    TrafficRules rules = patient_rules();
    rules.stalled_for_lower = rules.stalled_for_equals = milliseconds(20);
    rules.stalled_for_other_peers = milliseconds(5);
    rules.lead_bytes = 0;
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow urgent(traffic, 0, false, false, "slow");
    Traffic::Flow equal(traffic, 0, false, false, "slow");
    Traffic::Flow low(traffic, 9, false, false, "slow");
    Traffic::Seat stuck(urgent, nullptr);
    Traffic::Seat as_urgent(equal, nullptr);
    check(turn(stuck, mib) == mib, "it never ends");
    for (int frame = 0; frame < 4; ++frame) {
        check(turn(as_urgent, mib) == mib, "an equal goes on");
        as_urgent.sent(mib);
    }
    Traffic::Seat less_urgent(low, nullptr);
    check(turn(less_urgent, mib) == mib, "and so does what is less urgent");
}

void a_slow_peer_holds_up_nobody_else() {
    TrafficRules rules = patient_rules();
    rules.slow_bytes_per_s = 100'000'000;
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow urgent(traffic, 0, false, false, "slow");
    Traffic::Flow beside(traffic, 9, false, false, "other");
    Traffic::Seat seat(urgent, nullptr);
    Traffic::Seat free(beside, nullptr);
    check(turn(seat, mib) == mib, "urgent");
    check(turn(free, mib, moment) == 0, "nobody knows yet that it is slow");
    seat.sent(mib);  // 1 MiB in 50 ms
    check(turn(seat, mib) == mib, "urgent");
    check(turn(free, mib, moment) == mib, "its peer is known to be slow");
}

void a_paced_flow_holds_up_nobody() {
    TrafficRules rules = patient_rules();
    rules.lead_bytes = 0;
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow paced(traffic, 0, false, true, "a");
    Traffic::Flow equal(traffic, 0, false, false, "a");
    Traffic::Flow low(traffic, 9, false, false, "a");
    Traffic::Seat at_its_pace(paced, nullptr);
    check(turn(at_its_pace, mib) == mib, "it takes its turn, and time");
    Traffic::Seat other(low, nullptr);
    check(turn(other, mib) == mib, "what is less urgent");
    other.sent(mib);
    Traffic::Seat beside(equal, nullptr);
    check(turn(at_its_pace, mib) == mib, "the next");
    for (int frame = 0; frame < 4; ++frame) {
        check(turn(beside, mib) == mib, "an equal");
        beside.sent(mib);
    }
    check(turn(other, mib, moment) == 0, "only one without a pace is waited for");
}

void a_wait_ends_when_it_is_told_to() {
    const auto traffic = std::make_shared<Traffic>(patient_rules());
    Traffic::Flow urgent(traffic, 0, false, false, "a");
    Traffic::Flow low(traffic, 9, false, false, "a");
    Traffic::Seat seat(urgent, nullptr);
    Traffic::Seat waiting(low, nullptr);
    std::atomic<bool> stop{false};
    std::jthread later([&] {
        std::this_thread::sleep_for(moment);
        stop = true;
    });
    check(waiting.wait_turn(mib, Clock::now() + std::chrono::hours(1), stop) == 0, "stopped");
}

void a_turn_without_bytes_costs_nothing() {
    TrafficRules rules = patient_rules();
    rules.lead_bytes = 0;
    const auto traffic = std::make_shared<Traffic>(rules);
    Traffic::Flow one(traffic, 3, false, false, "a");
    Traffic::Flow other(traffic, 3, false, false, "a");
    Traffic::Seat stays(other, nullptr);
    for (int round = 0; round < 3; ++round) {
        Traffic::Seat seat(one, nullptr);
        check(turn(seat, mib) == mib, "neither is ahead");
    }
}

void crowds_get_through() {
    const auto traffic = std::make_shared<Traffic>();
    std::atomic<int> finished{0};
    constexpr int flows = 12;
    {
        std::vector<std::jthread> threads;
        for (int number = 0; number < flows; ++number) {
            threads.emplace_back([&, number] {
                std::mt19937 random(static_cast<unsigned>(number));
                const auto priority = static_cast<std::uint8_t>(number % 3 * 100);
                Traffic::Flow flow(traffic, priority, priority > 128, number == 5, std::string(1, static_cast<char>('a' + number % 4)));
                const auto work = [&](unsigned seed) {
                    std::mt19937 own(seed);
                    for (int call = 0; call < 20; ++call) {
                        Traffic::Seat seat(flow, nullptr);
                        for (int frame = 0; frame < 10; ++frame) {
                            const std::uint64_t room = turn(seat, 4 * mib, milliseconds(20));
                            if (own() % 8 == 0) {
                                std::this_thread::yield();
                            }
                            seat.sent(room / (1 + own() % 3));
                        }
                        if (own() % 2 == 0) {
                            seat.leave();
                        }
                    }
                };
                const auto seed = static_cast<unsigned>(random());
                std::jthread second([&] { work(seed + 1); });
                work(seed);
                second.join();
                finished += 1;
            });
        }
    }
    check(finished == flows, "every flow has ended");
}

// What waits in the kernel is bounded as a transfer asks for it, by less while others are at work, and afterwards as
// it was.
void a_seat_bounds_what_waits_in_the_kernel() {
    const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
    const auto bound = [&] {
        std::uint32_t bytes = 0;
        socklen_t size = sizeof(bytes);
        check(::getsockopt(socket, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, &size) == 0, "it is TCP");
        return bytes;
    };
    const std::uint32_t before = bound();
    Stream stream(socket, "nobody", 20);
    const auto traffic = std::make_shared<Traffic>();
    Traffic::Flow flow(traffic, 128, false, false, "a");
    Traffic::Flow background(traffic, 255, true, false, "a");
    const std::uint32_t shared = TrafficRules{}.shared_unsent_bytes;
    const auto seated = [&](Traffic::Flow& which, std::uint32_t unsent_bytes_max) {
        const Traffic::Seat seat(which, &stream, unsent_bytes_max);
        return bound();
    };
    check(seated(flow, 0) == before, "a flow alone leaves it to the kernel");
    check(seated(flow, 10 * shared) == 10 * shared, "as asked");
    check(seated(background, 0) == shared, "little by a background flow");
    check(seated(background, shared / 2) == shared / 2, "less if asked");
    check(seated(background, 10 * shared) == shared, "and not more");
    check(seated(flow, 10 * shared) == shared, "nor by one that is not alone");
}

}  // namespace

int main() {
    a_flow_alone_never_waits();
    a_background_flow_sends_little_at_once();
    equals_advance_together();
    urgent_flows_go_first_and_nothing_starves();
    what_an_urgent_flow_does_not_use_is_free();
    a_flow_between_two_calls_keeps_its_place();
    a_place_is_not_kept_for_long();
    a_peer_that_takes_nothing_holds_up_nobody_else();
    a_flow_that_its_peer_stopped_holds_up_nobody();
    a_slow_peer_holds_up_nobody_else();
    a_paced_flow_holds_up_nobody();
    a_wait_ends_when_it_is_told_to();
    a_turn_without_bytes_costs_nothing();
    crowds_get_through();
    a_seat_bounds_what_waits_in_the_kernel();
    std::cout << "traffic: passed\n";
}
