#include "shares.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "../signals_blocked.h"

namespace kvstore {
namespace {

std::atomic<unsigned> helpers_in_use{0};

// A forked child has none of its parent's threads.
void forget_helpers_in_children() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { helpers_in_use.store(0); });
    static_cast<void>(registered);
}

// Takes up to `wanted` of the helper threads that no other call has.
unsigned claim_helpers(unsigned wanted) {
    unsigned used = helpers_in_use.load();
    unsigned count = 0;
    do {
        count = std::min(wanted, helper_threads_max - std::min(used, helper_threads_max));
    } while (!helpers_in_use.compare_exchange_weak(used, used + count));
    return count;
}

// The shares of one call. A helper that the system runs late may outlive the call: it finds no share left, and looks at
// nothing but this.
struct SharedWork {
    const std::size_t shares;
    const std::function<void(std::size_t)>* const work;  // valid while a share is left or being worked on
    std::atomic<std::size_t> next{0};
    std::atomic<std::size_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;

    SharedWork(std::size_t share_count, const std::function<void(std::size_t)>& function)
        : shares(share_count), work(&function) {}

    void take_shares() {
        for (std::size_t share = next.fetch_add(1); share < shares; share = next.fetch_add(1)) {
            (*work)(share);
            if (done.fetch_add(1) + 1 == shares) {
                const std::lock_guard lock(mutex);
                all_done.notify_all();
            }
        }
    }

    void wait() {
        std::unique_lock lock(mutex);
        all_done.wait(lock, [this] { return done.load() == shares; });
    }
};

}  // namespace

void run_shares(std::size_t shares, unsigned threads, const std::function<void(std::size_t)>& work) {
    const std::size_t useful = std::min<std::size_t>(threads, shares);
    if (useful < 2) {
        for (std::size_t share = 0; share < shares; ++share) {
            work(share);
        }
        return;
    }
    forget_helpers_in_children();
    const auto shared = std::make_shared<SharedWork>(shares, work);
    unsigned claimed = claim_helpers(static_cast<unsigned>(useful - 1));
    {
        const SignalsBlocked blocked;
        try {
            for (; claimed > 0; --claimed) {
                // Not joined: on a busy machine the rest of the work may be done before a helper first runs.
                std::thread([shared] {
                    shared->take_shares();
                    helpers_in_use.fetch_sub(1);
                }).detach();
            }
        } catch (const std::system_error&) {
            // The system gives no more threads; those there are do the work.
            helpers_in_use.fetch_sub(claimed);
        }
    }
    shared->take_shares();
    shared->wait();
}

}  // namespace kvstore
