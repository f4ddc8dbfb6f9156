#include "shares.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace kvstore {
namespace {

std::atomic<unsigned> helpers_in_use{0};

// A forked child has none of its parent's threads.
void forget_helpers_in_children() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { helpers_in_use.store(0); });
    static_cast<void>(registered);
}

// A number of helper threads that no other call can take.
class HelperClaim {
  public:
    explicit HelperClaim(unsigned wanted) {
        unsigned used = helpers_in_use.load();
        do {
            count_ = std::min(wanted, helper_threads_max - std::min(used, helper_threads_max));
        } while (!helpers_in_use.compare_exchange_weak(used, used + count_));
    }
    ~HelperClaim() { helpers_in_use.fetch_sub(count_); }
    HelperClaim(const HelperClaim&) = delete;
    HelperClaim& operator=(const HelperClaim&) = delete;

    unsigned count() const { return count_; }

  private:
    unsigned count_ = 0;
};

// Threads begin with their creator's mask: signals go to threads that know what to do with them.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t before_;
};

}  // namespace

void run_shares(std::size_t shares, unsigned threads, const std::function<void(std::size_t)>& work) {
    std::atomic<std::size_t> next{0};
    const auto take_shares = [&] {
        for (std::size_t share = next.fetch_add(1); share < shares; share = next.fetch_add(1)) {
            work(share);
        }
    };
    const std::size_t useful = std::min<std::size_t>(threads, shares);
    if (useful < 2) {
        take_shares();
        return;
    }
    forget_helpers_in_children();
    const HelperClaim claim(static_cast<unsigned>(useful - 1));
    std::vector<std::thread> helpers;
    helpers.reserve(claim.count());
    {
        const SignalsBlocked blocked;
        try {
            while (helpers.size() < claim.count()) {
                helpers.emplace_back(take_shares);
            }
        } catch (const std::system_error&) {
            // The system gives no more threads; those there are do the work.
        }
    }
    take_shares();
    for (std::thread& helper : helpers) {
        helper.join();
    }
}

}  // namespace kvstore
