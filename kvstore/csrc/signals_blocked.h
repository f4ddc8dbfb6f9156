// Threads begin with their creator's signal mask: signals go to threads that know what to do with them.
#pragma once

#include <pthread.h>
#include <signal.h>

namespace kvstore {

// Blocks every signal for the calling thread, as long as it lives.
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

}  // namespace kvstore
