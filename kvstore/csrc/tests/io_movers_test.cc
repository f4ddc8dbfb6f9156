// Both movers on real files, from several threads, with cancels, batches that nobody waits for, and closes in between.
#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../io/engine.h"
#include "../io/engine_choice.h"
#include "io_cases.h"

using namespace kvstore;
using kvstore::testing::check;
using kvstore::testing::Pages;
using kvstore::testing::row;
using kvstore::testing::soon;
using kvstore::testing::TemporaryFile;
using kvstore::testing::throws;

namespace {

constexpr std::uint64_t page = 4096;
constexpr io::LineRules rules{.depth = 6, .urgent_depth = 2, .piece_bytes = 4 * page};

void run_well(io::Engine& engine, const std::vector<io::Row>& rows, bool is_urgent = false) {
    const auto batch = engine.submit(rows, is_urgent);
    check(batch->wait(rows.size(), soon()) == rows.size(), "all end");
    check(batch->failures().empty(), "and end well");
}

void test_bytes(const std::string& name) {
    const auto engine = io::Engine::make(io::mover_of(name), rules);
    const TemporaryFile file;
    const std::uint64_t number = engine->add_file(file.get());
    Pages source(257 * page);
    Pages target(257 * page);
    source.fill(1);
    run_well(*engine, {row(io::Kind::write, number, 3 * page, source.address(), 257 * page)});
    run_well(*engine, {row(io::Kind::sync, number, 0, 0, 0)});
    std::vector<io::Row> rows;
    for (std::uint64_t at = 0; at < 257; ++at) {
        rows.push_back(row(io::Kind::read, number, (3 + at) * page, target.address(at * page), page));
    }
    run_well(*engine, rows, true);
    check(std::memcmp(source.data(), target.data(), source.size_bytes()) == 0, "every byte is the same");

    const auto past = engine->submit(std::vector{row(io::Kind::read, number, 259 * page, target.address(), 6 * page)}, false);
    pollfd readable{past->descriptor(), POLLIN, 0};
    check(::poll(&readable, 1, 30'000) == 1, "the descriptor tells the end");
    check(past->failures().size() == 1 && past->failures()[0].error == EIO && past->failures()[0].why == 1, "EIO");

    engine->remove_file(number);
    const int closed = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    const std::uint64_t bad = engine->add_file(closed);
    ::close(closed);
    const auto batch = engine->submit(std::vector{row(io::Kind::write, bad, 0, source.address(), page)}, false);
    check(batch->wait(1, soon()) == 1 && batch->failures()[0].error == EBADF, "what the system says arrives");
    engine->close();
    engine->close();
}

// Threads that write, read back, cancel and forget, each in a range of its own.
void test_threads(const std::string& name) {
    const auto engine = io::Engine::make(io::mover_of(name), rules);
    const TemporaryFile file;
    const std::uint64_t number = engine->add_file(file.get());
    std::vector<std::thread> threads;
    // Memory lives until the engine is closed: what is cancelled or forgotten may still move.
    std::vector<std::unique_ptr<Pages>> sources;
    std::vector<std::unique_ptr<Pages>> targets;
    std::array<std::vector<std::unique_ptr<Pages>>, 4> unread;  // of each thread, of each batch
    constexpr std::uint64_t share = 40;
    for (std::uint64_t thread = 0; thread < 4; ++thread) {
        sources.push_back(std::make_unique<Pages>(share * page));
        targets.push_back(std::make_unique<Pages>(share * page));
        sources.back()->fill(static_cast<unsigned>(thread));
    }
    for (std::uint64_t thread = 0; thread < 4; ++thread) {
        threads.emplace_back([&, thread] {
            std::mt19937 random(static_cast<unsigned>(thread));
            Pages& source = *sources[thread];
            Pages& target = *targets[thread];
            const std::uint64_t base = thread * share * page;
            for (int round = 0; round < 20; ++round) {
                std::vector<io::Row> rows;
                for (std::uint64_t at = 0; at < share;) {
                    const std::uint64_t pages = std::min<std::uint64_t>(1 + random() % 12, share - at);
                    rows.push_back(row(io::Kind::write, number, base + at * page, source.address(at * page), pages * page));
                    at += pages;
                }
                if (random() % 3 == 0) {
                    const auto batch = engine->submit(rows, false);
                    engine->cancel(*batch);
                    check(batch->wait(rows.size(), soon()) == rows.size(), "cancelled ones end");
                    for (const io::Failure& failure : batch->failures()) {
                        check(failure.error == ECANCELED, "as cancelled");
                    }
                }
                run_well(*engine, rows, random() % 2 == 0);
                for (io::Row& one : rows) {
                    one.kind = static_cast<std::uint64_t>(io::Kind::read);
                    one.address += target.address() - source.address();
                }
                std::memset(target.data(), 0, target.size_bytes());
                run_well(*engine, rows, random() % 2 == 0);
                check(std::memcmp(source.data(), target.data(), source.size_bytes()) == 0, "every byte is the same");
                if (random() % 4 == 0) {
                    unread[thread].push_back(std::make_unique<Pages>(share * page));
                    for (io::Row& one : rows) {
                        one.address += unread[thread].back()->address() - target.address();
                    }
                    engine->submit(rows, false);
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    engine->close();
}

void test_close_while_others_submit(const std::string& name) {
    for (int round = 0; round < 20; ++round) {
        const auto engine = io::Engine::make(io::mover_of(name), rules);
        const TemporaryFile file;
        const std::uint64_t number = engine->add_file(file.get());
        Pages memory(64 * page);
        memory.fill(1);
        std::atomic<int> begun{0};
        std::array<std::thread, 3> threads;
        for (std::thread& thread : threads) {
            thread = std::thread([&] {
                try {
                    while (true) {
                        const auto batch = engine->submit(
                            std::vector(8, row(io::Kind::write, number, 0, memory.address(), 8 * page)), false);
                        begun.fetch_add(1);
                        check(batch->wait(8, soon()) == 8, "all end, also those that a close cancels");
                    }
                } catch (const io::ClosedError&) {
                }
            });
        }
        while (begun.load() < 5) {
            std::this_thread::yield();
        }
        engine->close();
        for (std::thread& thread : threads) {
            thread.join();
        }
    }
}

// A child made by fork has neither the threads nor the ring; it leaves both alone, whatever the parent was doing.
void test_fork(const std::string& name) {
    auto engine = io::Engine::make(io::mover_of(name), rules);
    const TemporaryFile file;
    const std::uint64_t number = engine->add_file(file.get());
    Pages memory(64 * page);
    memory.fill(1);
    auto batch = engine->submit(std::vector(200, row(io::Kind::write, number, 0, memory.address(), 64 * page)), false);
    std::thread waiting([&] { batch->wait(200, soon()); });
    for (int round = 0; round < 5; ++round) {
        const pid_t child = ::fork();
        if (child == 0) {
            const bool is_known = engine->is_inherited() && batch->is_inherited();
            batch.reset();
            engine.reset();
            ::_exit(is_known ? 0 : 1);
        }
        int status = 0;
        check(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ends");
    }
    waiting.join();
    check(batch->wait(200, soon()) == 200 && batch->failures().empty(), "nothing was lost by the forks");
    engine->close();
}

// The descriptors of this process's rings.
std::vector<int> rings() {
    std::vector<int> found;
    for (int descriptor = 0; descriptor < 1024; ++descriptor) {
        std::array<char, 64> target{};
        const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
        if (::readlink(path.c_str(), target.data(), target.size() - 1) > 0 &&
            std::string(target.data()).find("io_uring") != std::string::npos) {
            found.push_back(descriptor);
        }
    }
    return found;
}

// The kernel refuses the ring: every operation ends, with an error that says so; what it had begun ends as it does.
void test_ring_fails() {
    const auto engine = io::Engine::make(io::mover_of("io_uring"), rules);
    const TemporaryFile file;
    const std::uint64_t number = engine->add_file(file.get());
    Pages memory(64 * page);
    memory.fill(1);
    run_well(*engine, {row(io::Kind::write, number, 0, memory.address(), 64 * page)});
    std::array<int, 2> pipe{};
    check(::pipe2(pipe.data(), O_CLOEXEC) == 0, "a pipe");
    const std::uint64_t slow = engine->add_file(pipe[0]);
    const auto begun = engine->submit(std::vector{row(io::Kind::read, slow, 0, memory.address(), page)}, false);
    run_well(*engine, {row(io::Kind::sync, number, 0, 0, 0)});  // by now the other one has been begun
    const int nothing = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    check(rings().size() == 1, "one ring");
    for (const int ring : rings()) {
        check(::dup3(nothing, ring, O_CLOEXEC) == ring, "another file in its place");
    }
    ::close(nothing);
    for (int round = 0; round < 3; ++round) {
        const auto batch = engine->submit(
            std::vector(20, row(io::Kind::write, number, 0, memory.address(page), 8 * page)), round == 1);
        check(batch->wait(20, soon()) == 20, "all end");
        // Of the first some may be taken before it is noticed.
        const auto failures = batch->failures();
        check(round == 0 || failures.size() == 20, "and fail");
        for (const io::Failure& failure : failures) {
            check(failure.why == static_cast<std::int64_t>(io::Why::mover) && failure.error != 0, "because of the ring");
        }
    }
    check(begun->ended().empty(), "its memory is still in use");
    std::thread closing([&] { engine->close(); });
    check(::write(pipe[1], memory.data() + page, page) == static_cast<ssize_t>(page), "what it waits for");
    closing.join();
    check(begun->ended().size() == 1 && begun->failures().empty(), "what had been begun ends well");
    check(std::memcmp(memory.data(), memory.data() + page, page) == 0, "with its bytes");
    ::close(pipe[0]);
    ::close(pipe[1]);

    // One that does nothing when it happens, and is closed so.
    const auto idle = io::Engine::make(io::mover_of("io_uring"), rules);
    const int null = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    for (const int ring : rings()) {
        check(::dup3(null, ring, O_CLOEXEC) == ring, "another file in its place");
    }
    ::close(null);
    const std::uint64_t other = idle->add_file(file.get());
    const auto last = idle->submit(std::vector{row(io::Kind::sync, other, 0, 0, 0)}, true);
    check(last->wait(1, soon()) == 1, "it ends");
    idle->close();
}

void test_choice() {
    check(io::choose_engine(8, "threads").name == "threads", "threads can always be had");
    check(throws<std::runtime_error>([] { io::choose_engine(8, "magic"); }, "KVSTORE_IO=magic"), "no such engine");
    const PathChoice choice = io::choose_engine(8, std::nullopt);
    const std::string missing = io::engine_offers(8)[0].missing;
    check((choice.name == "io_uring") == missing.empty(), "the ring where there is one");
    check(choice.why_not_better == missing, "and the reason where there is none");
}

}  // namespace

int main() {
    if (::getenv("KVSTORE_IO") == nullptr) {
        test_choice();
    }
    for (const PathOffer& offer : io::engine_offers(rules.depth + rules.urgent_depth)) {
        if (!offer.missing.empty()) {
            std::cout << offer.name << " is not tested: " << offer.missing << "\n";
            continue;
        }
        test_bytes(offer.name);
        test_threads(offer.name);
        test_close_while_others_submit(offer.name);
        test_fork(offer.name);
        if (offer.name == "io_uring") {
            test_ring_fails();
        }
    }
}
