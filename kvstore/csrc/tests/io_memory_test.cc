// File I/O when memory runs out: a submit has done nothing or all of it, and what is under way needs none.
#include <cerrno>
#include <new>
#include <vector>

#include "../io/engine.h"
#include "failing_memory.h"
#include "io_cases.h"

using namespace kvstore;
using kvstore::testing::allocations_left;
using kvstore::testing::check;
using kvstore::testing::row;
using kvstore::testing::soon;
using kvstore::testing::Stage;
using kvstore::testing::staged_engine;
using kvstore::testing::TemporaryFile;

namespace {

constexpr std::uint64_t page = 4096;
// Never touched: nothing is moved.
constexpr std::uint64_t somewhere = 1 << 20;
constexpr io::LineRules rules{.depth = 4, .urgent_depth = 2, .piece_bytes = page};

struct Scene {
    Scene() : engine(staged_engine(stage, rules)), number(engine->add_file(file.get())) {
        stage.begun.reserve(rules.depth + rules.urgent_depth);
    }
    std::vector<io::Row> mixed(std::size_t count) const {
        std::vector<io::Row> rows;
        for (std::size_t at = 0; at < count; ++at) {
            const auto kind = static_cast<io::Kind>(at % 3);
            rows.push_back(kind == io::Kind::sync ? row(kind, number, 0, 0, 0)
                                                  : row(kind, number, at * 2 * page, somewhere, 2 * page));
        }
        return rows;
    }

    TemporaryFile file;
    Stage stage;
    std::shared_ptr<io::Engine> engine;
    std::uint64_t number;
};

void test_a_submit_without_memory_begins_nothing() {
    Scene scene;
    std::vector<io::Row> rows = scene.mixed(40);
    int failures = 0;
    for (int round = 0; round < 30; ++round) {
        for (int allocation = 0;; ++allocation) {
            std::shared_ptr<io::Batch> batch;
            try {
                allocations_left = allocation;
                batch = scene.engine->submit(rows, round % 2 == 0);
                allocations_left.reset();
            } catch (const std::bad_alloc&) {
                ++failures;
                scene.stage.begin();
                check(scene.stage.begun.empty(), "something was begun that nobody can wait for");
                scene.engine->remove_file(scene.number);
                scene.number = scene.engine->add_file(scene.file.get());
                rows = scene.mixed(40);
                continue;
            }
            scene.stage.run();
            check(batch->wait(rows.size(), soon()) == rows.size() && batch->failures().empty(), "the next one ends well");
            break;
        }
    }
    check(failures > 100, "too few allocations failed: " + std::to_string(failures));
}

// The threads of a mover have nobody to tell that there is no memory, and neither has a close.
void test_what_is_under_way_needs_no_memory() {
    Scene scene;
    const auto batch = scene.engine->submit(scene.mixed(90), false);
    const auto urgent = scene.engine->submit(scene.mixed(30), true);
    const auto dropped = scene.engine->submit(scene.mixed(30), false);
    static_cast<void>(batch->descriptor());
    allocations_left = 0;
    for (int turn = 0; turn < 40; ++turn) {
        scene.stage.begin();
        switch (turn % 4) {
            case 0:
                scene.stage.end(0, -ENOSPC);
                break;
            case 1:
                scene.stage.end(0, -EINTR);
                break;
            case 2:
                scene.stage.end(scene.stage.begun.size() - 1, 0);
                break;
            default:
                scene.stage.end_well(0);
        }
    }
    scene.stage.begin();
    while (!scene.stage.begun.empty()) {
        scene.stage.refuse(0, EIO);
    }
    scene.engine->cancel(*dropped);
    scene.engine->close();
    const bool took_memory = allocations_left != 0;
    allocations_left.reset();
    check(!took_memory, "what is under way took memory");
    check(batch->ended().size() == 90 && urgent->ended().size() == 30 && dropped->ended().size() == 30, "all end");
}

}  // namespace

int main() {
    test_a_submit_without_memory_begins_nothing();
    test_what_is_under_way_needs_no_memory();
}
