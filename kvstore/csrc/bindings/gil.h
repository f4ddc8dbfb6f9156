// Python's lock, given up while bytes move or somebody waits.
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

namespace kvstore::bindings {

// As nanobind::gil_scoped_release, and for threads that Python has left behind as well: an interpreter that has ended does not
// give its lock to a daemon thread any more, but unwinds it (until Python 3.14), which no destructor survives. Such a thread
// stops here, and goes with its process.
class GilReleased {
  public:
    GilReleased() : state_(PyEval_SaveThread()) {}
    ~GilReleased() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            while (true) {
                ::pause();
            }
        }
    }
    GilReleased(const GilReleased&) = delete;
    GilReleased& operator=(const GilReleased&) = delete;

  private:
    PyThreadState* state_;
};

}  // namespace kvstore::bindings
