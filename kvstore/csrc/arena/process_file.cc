#include "process_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

namespace kvstore {
namespace {

std::atomic<std::uint64_t> forks{0};

// The descriptors to close in a child. Its mutex is held across a fork, so no descriptor is opened or closed meanwhile.
class Registry {
  public:
    static Registry& instance() {
        // Never destroyed: files may be closed while the process exits.
        static Registry& registry = *std::make_unique<Registry>().release();
        return registry;
    }

    template <typename Open>
    int add(Open open) {
        const std::lock_guard locked(mutex_);
        descriptors_.reserve(descriptors_.size() + 1);
        const int descriptor = open();
        if (descriptor >= 0) {
            descriptors_.push_back(descriptor);
        }
        return descriptor;
    }

    // A descriptor that is not known any more was closed by the fork that made this process.
    void close(int descriptor) {
        const std::lock_guard locked(mutex_);
        const auto found = std::find(descriptors_.begin(), descriptors_.end(), descriptor);
        if (found != descriptors_.end()) {
            descriptors_.erase(found);
            ::close(descriptor);
        }
    }

    Registry() {
        if (pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                           [] { instance().become_child(); }) != 0) {
            throw std::runtime_error("pthread_atfork: no memory");
        }
    }

  private:
    void become_child() {
        forks.fetch_add(1);
        for (const int descriptor : descriptors_) {
            ::close(descriptor);
        }
        descriptors_.clear();
        mutex_.unlock();
    }

    std::mutex mutex_;
    std::vector<int> descriptors_;
};

}  // namespace

ProcessFile ProcessFile::open(const std::string& path, int flags, unsigned mode) {
    return ProcessFile(Registry::instance().add([&] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); }));
}

ProcessFile ProcessFile::memfd(const std::string& name, unsigned flags) {
    return ProcessFile(Registry::instance().add([&] { return ::memfd_create(name.c_str(), flags | MFD_CLOEXEC); }));
}

ProcessFile::ProcessFile(ProcessFile&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

ProcessFile& ProcessFile::operator=(ProcessFile&& other) noexcept {
    if (this != &other) {
        close();
        descriptor_ = std::exchange(other.descriptor_, -1);
    }
    return *this;
}

ProcessFile ProcessFile::reopen(int flags) const { return open(proc_path(), flags); }

void ProcessFile::close() noexcept {
    if (descriptor_ >= 0) {
        const int kept = errno;
        Registry::instance().close(std::exchange(descriptor_, -1));
        errno = kept;
    }
}

std::uint64_t fork_count() noexcept {
    // Whoever asks without having opened a file must be told of forks, too.
    Registry::instance();
    return forks.load();
}

}  // namespace kvstore
