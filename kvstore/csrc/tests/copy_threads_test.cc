#include <thread>

#include "copy/shares.h"
#include "copy_cases.h"

namespace kvstore {
namespace {

using testing::check;

void shares_are_taken_once() {
    for (const unsigned threads : {1u, 2u, 5u, 40u}) {
        std::vector<int> taken(1000, 0);
        run_shares(taken.size(), threads, [&](std::size_t share) { ++taken[share]; });
        check(std::all_of(taken.begin(), taken.end(), [](int count) { return count == 1; }), "each share once");
    }
    run_shares(0, 4, [](std::size_t) { check(false, "there is no share to take"); });
}

// Callers in parallel, more threads asked for than there may be.
void callers_in_parallel(const testing::NamedKernels& named) {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&named, caller] {
            const CopyOptions options{named.kernels, 7, caller % 2 == 0};
            testing::large_entries(named, options, " in parallel");
            testing::random_checksums(named, options, " in parallel");
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::shares_are_taken_once();
    for (const auto& named : kvstore::testing::kernels_of_this_cpu()) {
        kvstore::callers_in_parallel(named);
        std::cout << named.name << ", callers in parallel: passed\n";
    }
}
