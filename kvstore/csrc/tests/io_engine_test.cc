// The order in which pieces begin, and what becomes of what a system call leaves undone: no I/O happens here.
#include <cerrno>
#include <map>
#include <set>
#include <string>

#include "../io/engine.h"
#include "io_cases.h"

using namespace kvstore;
using kvstore::testing::check;
using kvstore::testing::row;
using kvstore::testing::soon;
using kvstore::testing::Stage;
using kvstore::testing::staged_engine;
using kvstore::testing::TemporaryFile;
using kvstore::testing::throws;

namespace {

constexpr std::uint64_t page = 4096;
constexpr auto read = io::Kind::read;
constexpr auto write = io::Kind::write;
constexpr auto sync = io::Kind::sync;
// Never touched: nothing is moved.
constexpr std::uint64_t somewhere = 1 << 20;

struct Scene {
    explicit Scene(io::LineRules rules) : engine(staged_engine(stage, rules)), number(engine->add_file(file.get())) {}
    std::shared_ptr<io::Batch> submit(const std::vector<io::Row>& rows, bool is_urgent = false) {
        return engine->submit(rows, is_urgent);
    }
    std::vector<io::Row> many(io::Kind kind, std::size_t count, std::uint64_t pages = 1) const {
        std::vector<io::Row> rows;
        for (std::size_t i = 0; i < count; ++i) {
            rows.push_back(row(kind, number, i * pages * page, somewhere + i * pages * page, pages * page));
        }
        return rows;
    }

    TemporaryFile file;
    Stage stage;
    std::shared_ptr<io::Engine> engine;
    std::uint64_t number;
};

std::map<std::int64_t, io::Failure> failures_of(const io::Batch& batch) {
    std::map<std::int64_t, io::Failure> found;
    for (const io::Failure& failure : batch.failures()) {
        found[failure.task] = failure;
    }
    return found;
}

void test_depth_is_bounded() {
    Scene scene({.depth = 8, .urgent_depth = 2, .piece_bytes = page});
    const auto batch = scene.submit(scene.many(read, 10'000));
    std::size_t moved = 0;
    for (scene.stage.begin(); !scene.stage.begun.empty(); scene.stage.begin()) {
        check(scene.stage.begun.size() <= 8, "no more than the depth");
        check(scene.stage.begun.size() == std::min<std::size_t>(8, 10'000 - moved), "no fewer either");
        scene.stage.end_well(moved % scene.stage.begun.size());
        ++moved;
    }
    check(moved == 10'000 && batch->wait(10'000, soon()) == 10'000 && batch->failures().empty(), "all ended well");
}

void test_large_operations_are_split() {
    Scene scene({.depth = 16, .urgent_depth = 2, .piece_bytes = 4 * page});
    const auto batch = scene.submit({row(read, scene.number, 7 * page, somewhere, 14 * page)});
    scene.stage.begin();
    check(scene.stage.begun.size() == 4, "it fills the queue");
    std::uint64_t at = 0;
    for (const io::Piece& piece : scene.stage.begun) {
        check(piece.offset == 7 * page + at, "pieces follow each other in the file");
        check(reinterpret_cast<std::uintptr_t>(piece.address) == somewhere + at, "and in memory");
        at += piece.size_bytes;
    }
    check(at == 14 * page, "and are all of it");
    for (int i = 0; i < 3; ++i) {
        scene.stage.end_well(scene.stage.begun.size() - 1);
        check(batch->ended().empty(), "it ends with its last piece");
    }
    scene.stage.end_well(0);
    check(batch->ended().size() == 1, "then it has ended");
}

void test_order() {
    Scene scene({.depth = 4, .urgent_depth = 2, .floor_share = 4, .piece_bytes = page});
    const auto writes = scene.submit(scene.many(write, 100));
    const auto reads = scene.submit(scene.many(read, 100));
    scene.stage.begin();
    check(scene.stage.begun.size() == 4, "others have the depth");
    const auto urgent = scene.submit(scene.many(read, 60), true);
    scene.stage.begin();
    check(scene.stage.begun.size() == 6 && scene.stage.begun.back().is_urgent, "urgent ones begin behind a full queue");
    // From here on one ends, one begins: count what begins while all three wait.
    std::string order;
    while (urgent->ended().size() < 60) {
        scene.stage.end_well(0);
        const std::size_t before = scene.stage.begun.size();
        scene.stage.begin();
        for (std::size_t i = before; i < scene.stage.begun.size(); ++i) {
            const io::Piece& piece = scene.stage.begun[i];
            order += piece.is_urgent ? 'u' : piece.kind == read ? 'r' : 'w';
        }
    }
    check(order.find('r') != std::string::npos, "reads do not starve behind urgent ones");
    check(std::count(order.begin(), order.end(), 'u') >= 50, "urgent ones go first");
    const std::size_t reads_before = reads->ended().size();
    const std::size_t writes_before = writes->ended().size();
    while (reads->ended().size() < reads_before + 40) {
        scene.stage.end_well(0);
        scene.stage.begin();
    }
    const std::size_t written = writes->ended().size() - writes_before;
    check(written >= 8 && written <= 20, "of reads and writes, every fourth is a write: " + std::to_string(written));
    scene.stage.run();
    check(writes->wait(100, soon()) == 100 && reads->wait(100, soon()) == 100, "all end");
}

void test_what_is_left_short_goes_on() {
    Scene scene({.depth = 4, .urgent_depth = 0, .piece_bytes = 64 * page});
    for (const io::Kind kind : {read, write}) {
        const auto batch = scene.submit({row(kind, scene.number, page, somewhere, 10 * page)});
        check(::ftruncate(scene.file.get(), 100 * page) == 0, "the file is long enough");
        scene.stage.begin();
        scene.stage.end(0, 3 * page);
        scene.stage.begin();
        check(scene.stage.begun.size() == 1 && scene.stage.begun[0].offset == 4 * page, "it goes on");
        check(reinterpret_cast<std::uintptr_t>(scene.stage.begun[0].address) == somewhere + 3 * page, "in memory, too");
        for (const int error : {EINTR, EAGAIN}) {
            scene.stage.end(0, -error);
            scene.stage.begin();
            check(scene.stage.begun.size() == 1 && scene.stage.begun[0].size_bytes == 7 * page, "it is tried again");
        }
        // Not the file's end, so the page that was cut is moved again.
        scene.stage.end(0, 2 * page + 100);
        scene.stage.begin();
        check(scene.stage.begun[0].offset == 6 * page && scene.stage.begun[0].size_bytes == 5 * page, "from a page on");
        scene.stage.end_well(0);
        check(batch->ended().size() == 1 && batch->failures().empty(), "and ends well");
    }
}

void test_what_never_goes_on_fails() {
    Scene scene({.depth = 4, .urgent_depth = 0, .piece_bytes = 64 * page});
    for (const auto& [kind, result, error] : {std::tuple{read, -EAGAIN, EAGAIN}, {write, -EINTR, EINTR}, {write, 0, EIO}}) {
        const auto batch = scene.submit({row(kind, scene.number, 0, somewhere, page)});
        std::size_t tries = 0;
        for (scene.stage.begin(); !scene.stage.begun.empty(); scene.stage.begin()) {
            scene.stage.end(0, result);
            ++tries;
            check(tries < 100'000, "the tries have an end");
        }
        check(failures_of(*batch).at(0).error == error, "and an error");
    }
}

void test_the_end_of_a_file() {
    Scene scene({.depth = 4, .urgent_depth = 0, .piece_bytes = 4 * page});
    check(::ftruncate(scene.file.get(), 5 * page + 10) == 0, "the file has a size");
    const auto batch = scene.submit({row(read, scene.number, 0, somewhere, 8 * page), row(read, scene.number, 4 * page, somewhere, 4 * page)});
    scene.stage.begin();
    check(scene.stage.begun.size() == 3, "three pieces");
    scene.stage.end(1, page + 10);
    check(batch->ended().empty(), "the other piece of it is under way");
    scene.stage.end(0, 4 * page);
    scene.stage.end(0, page);
    scene.stage.begin();
    scene.stage.end(0, 0);
    const auto failures = failures_of(*batch);
    check(failures.size() == 2 && failures.at(0).error == EIO && failures.at(1).error == EIO, "both end with EIO");
    check(failures.at(0).why == static_cast<std::int64_t>(io::Why::file_end) && failures.at(1).offset == 5 * static_cast<std::int64_t>(page), "and say where");
}

void test_a_failed_piece_stops_its_operation() {
    Scene scene({.depth = 2, .urgent_depth = 0, .piece_bytes = page});
    const auto batch = scene.submit({row(write, scene.number, 0, somewhere, 100 * page), row(write, scene.number, 0, somewhere, page), row(sync, scene.number, 0, 0, 0)});
    scene.stage.begin();
    scene.stage.end(0, -ENOSPC);
    check(batch->ended().empty(), "a piece of it is under way");
    scene.stage.end_well(0);
    check(batch->ended() == std::vector<std::int64_t>{0}, "then it is over, and the rest never begins");
    scene.stage.begin();
    check(scene.stage.begun.size() == 2 && scene.stage.begun[1].kind == sync, "the others go on");
    scene.stage.end_well(0);
    scene.stage.end(0, -EIO);
    const auto failures = failures_of(*batch);
    check(failures.at(0).error == ENOSPC && failures.at(2).error == EIO && failures.size() == 2, "each with its own error");
}

void test_a_mover_that_has_failed() {
    Scene scene({.depth = 2, .urgent_depth = 0, .piece_bytes = page});
    const auto batch = scene.submit(scene.many(write, 3, 2));
    scene.stage.begin();  // both pieces of the first
    scene.stage.end(1, -ENOSPC);
    scene.stage.refuse(0, EINVAL);
    scene.stage.begin();
    scene.stage.refuse(1, EINVAL);
    scene.stage.end_well(0);
    scene.stage.begin();
    scene.stage.refuse(0, EINVAL);
    scene.stage.refuse(0, EINVAL);
    scene.stage.begin();
    check(scene.stage.begun.empty(), "nothing more is begun of either");
    const auto failures = failures_of(*batch);
    check(failures.size() == 3 && failures.at(0).error == ENOSPC && failures.at(1).error == EINVAL, "each ends with its error");
    check(failures.at(0).why == static_cast<std::int64_t>(io::Why::operation), "the first that came");
    check(failures.at(1).why == static_cast<std::int64_t>(io::Why::mover), "and whose it is");
}

void test_cancel() {
    Scene scene({.depth = 2, .urgent_depth = 0, .piece_bytes = page});
    const auto other = scene.submit({row(read, scene.number, 0, somewhere, page)});
    const auto batch = scene.submit({row(read, scene.number, 0, somewhere, 3 * page), row(read, scene.number, 0, somewhere, page), row(sync, scene.number, 0, 0, 0)});
    scene.stage.begin();
    scene.engine->cancel(*batch);
    check(batch->ended() == (std::vector<std::int64_t>{1, 2}), "what was not begun ends at once");
    scene.stage.end_well(1);
    check(batch->ended().size() == 3 && failures_of(*batch).at(0).error == ECANCELED, "what was, with its last piece");
    scene.engine->cancel(*batch);
    scene.stage.run();
    check(other->ended().size() == 1 && other->failures().empty(), "others go on");
    const auto whole = scene.submit({row(read, scene.number, 0, somewhere, page)});
    scene.stage.begin();
    scene.engine->cancel(*whole);
    scene.stage.end(0, -EINTR);
    scene.stage.run();
    check(whole->failures().empty(), "what has been begun wholly does all of its work");
}

void test_files_and_their_operations() {
    Scene scene({.depth = 2, .urgent_depth = 0, .piece_bytes = page});
    const auto batch = scene.submit({row(read, scene.number, 0, somewhere, page)});
    check(throws<std::invalid_argument>([&] { scene.engine->remove_file(scene.number); }, "1 operations"), "in use");
    scene.stage.run();
    scene.engine->remove_file(scene.number);
    check(throws<std::invalid_argument>([&] { scene.engine->remove_file(scene.number); }, "no open file"), "gone");
    check(throws<std::invalid_argument>([&] { scene.submit({row(sync, scene.number, 0, 0, 0)}); }, "no open file"), "gone");
    check(scene.engine->add_file(scene.file.get()) != scene.number, "numbers do not come again");
    check(throws<std::invalid_argument>(
              [&] { scene.submit(std::vector<io::Row>(io::batch_operations_max + 1)); }, "at most"),
          "a batch has a limit");
}

void test_the_sum_of_operations_has_a_limit() {
    Scene scene({.depth = 2, .urgent_depth = 0, .piece_bytes = page});
    const std::vector<io::Row> rows(io::batch_operations_max, row(sync, scene.number, 0, 0, 0));
    for (std::size_t i = 0; i < io::operations_max / io::batch_operations_max; ++i) {
        scene.submit(rows);
    }
    check(throws<std::invalid_argument>([&] { scene.submit({rows[0]}); }, "have not ended"), "no more than that");
    scene.engine->close();
}

void test_close() {
    Scene scene({.depth = 1, .urgent_depth = 0, .piece_bytes = page});
    const auto batch = scene.submit(scene.many(read, 5));
    scene.stage.run();
    const auto waiting = scene.submit(scene.many(read, 5));
    scene.engine->close();
    check(scene.stage.is_stopped, "the mover is told");
    check(waiting->ended().size() == 5 && failures_of(*waiting).size() == 5, "what waited was cancelled");
    check(throws<io::ClosedError>([&] { scene.submit({}); }, "closed"), "and nothing more is taken");
    check(batch->failures().empty(), "what had ended stays so");
}

}  // namespace

int main() {
    test_depth_is_bounded();
    test_large_operations_are_split();
    test_order();
    test_what_is_left_short_goes_on();
    test_what_never_goes_on_fails();
    test_the_end_of_a_file();
    test_a_failed_piece_stops_its_operation();
    test_a_mover_that_has_failed();
    test_cancel();
    test_files_and_their_operations();
    test_the_sum_of_operations_has_a_limit();
    test_close();
}
