#include "ring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>

namespace kvstore::io {
namespace {

// A millisecond each: without room for so long, there will be none.
constexpr unsigned fruitless_max = 30'000;

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

int set_up(unsigned entries, std::uint32_t flags, abi::Parameters& parameters) {
    parameters = {};
    parameters.flags = flags;
    return static_cast<int>(::syscall(abi::setup_call, entries, &parameters));
}

}  // namespace

void Ring::Mapping::map(int descriptor, std::size_t size_bytes, std::uint64_t offset) {
    void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor,
                        static_cast<off_t>(offset));
    if (data == MAP_FAILED) {
        fail("mapping the rings of io_uring");
    }
    data_ = static_cast<std::byte*>(data);
    size_bytes_ = size_bytes;
    // A forked child must not even see it.
    static_cast<void>(::madvise(data, size_bytes, MADV_DONTFORK));
}

Ring::Mapping::~Mapping() {
    if (data_ != nullptr) {
        ::munmap(data_, size_bytes_);
    }
}

Ring::Ring(unsigned entries) {
    abi::Parameters parameters;
    // This thread need not be interrupted for what has ended, where the kernel (5.19 on) can leave it be.
    for (const std::uint32_t flags : {abi::setup_coop_taskrun, std::uint32_t{0}}) {
        descriptor_ = set_up(entries, flags, parameters);
        if (descriptor_ >= 0 || errno != EINVAL) {
            break;
        }
    }
    if (descriptor_ < 0) {
        fail("io_uring_setup");
    }
    try {
        constexpr std::uint32_t needed = abi::feature_single_mmap | abi::feature_nodrop;
        if ((parameters.features & needed) != needed) {
            errno = ENOSYS;
            fail("io_uring of a kernel older than 5.6");
        }
        const std::size_t submission_bytes = parameters.submission.array + parameters.submission_entries * sizeof(std::uint32_t);
        const std::size_t completion_bytes =
            parameters.completion.entries + parameters.completion_entries * sizeof(abi::Completion);
        rings_.map(descriptor_, std::max(submission_bytes, completion_bytes), abi::offset_of_rings);
        entries_.map(descriptor_, parameters.submission_entries * sizeof(abi::Submission), abi::offset_of_entries);
        ask_what_it_knows();
    } catch (...) {
        ::close(descriptor_);
        throw;
    }
    submission_tail_ = rings_.at<std::uint32_t>(parameters.submission.tail);
    submission_mask_ = *rings_.at<std::uint32_t>(parameters.submission.ring_mask);
    completion_head_ = rings_.at<std::uint32_t>(parameters.completion.head);
    completion_tail_ = rings_.at<std::uint32_t>(parameters.completion.tail);
    completion_mask_ = *rings_.at<std::uint32_t>(parameters.completion.ring_mask);
    completions_ = rings_.at<abi::Completion>(parameters.completion.entries);
    submissions_ = entries_.at<abi::Submission>(0);
    // Entry n of the ring is always entry n of the array.
    auto* numbers = rings_.at<std::uint32_t>(parameters.submission.array);
    for (std::uint32_t number = 0; number < parameters.submission_entries; ++number) {
        numbers[number] = number;
    }
}

Ring::~Ring() { ::close(descriptor_); }

void Ring::ask_what_it_knows() {
    const auto probe = std::make_unique<abi::Probe>();
    if (::syscall(abi::register_call, descriptor_, abi::register_probe, probe.get(), 256) < 0) {
        fail("io_uring of a kernel older than 5.6");
    }
    for (std::size_t i = 0; i < probe->count; ++i) {
        known_[probe->operations[i].operation] = (probe->operations[i].flags & abi::probe_supported) != 0;
    }
}

void Ring::push(const abi::Submission& submission) {
    std::atomic_ref<std::uint32_t> tail(*submission_tail_);
    const std::uint32_t at = tail.load(std::memory_order_relaxed);
    submissions_[at & submission_mask_] = submission;
    tail.store(at + 1, std::memory_order_release);
    ++queued_;
}

void Ring::enter(bool waits) {
    while (true) {
        const long taken = ::syscall(abi::enter_call, descriptor_, queued_, waits ? 1 : 0,
                                     waits ? abi::enter_getevents : 0, nullptr, 0);
        if (taken >= 0) {
            queued_ -= static_cast<std::uint32_t>(taken);
            fruitless_ = 0;
            return;
        }
        // No room for now: completions that are there must be taken first.
        if ((errno == EAGAIN || errno == EBUSY || errno == ENOMEM) && ++fruitless_ < fruitless_max) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            return;
        }
        if (errno != EINTR) {
            fail("io_uring_enter");
        }
    }
}

std::optional<abi::Completion> Ring::pop() {
    std::atomic_ref<std::uint32_t> head(*completion_head_);
    const std::uint32_t at = head.load(std::memory_order_relaxed);
    if (at == std::atomic_ref<std::uint32_t>(*completion_tail_).load(std::memory_order_acquire)) {
        return std::nullopt;
    }
    const abi::Completion completion = completions_[at & completion_mask_];
    head.store(at + 1, std::memory_order_release);
    fruitless_ = 0;
    return completion;
}

// The kernel looks at the tail only while it is entered.
std::optional<std::uint64_t> Ring::take_back() {
    if (queued_ == 0) {
        return std::nullopt;
    }
    std::atomic_ref<std::uint32_t> tail(*submission_tail_);
    const std::uint32_t at = tail.load(std::memory_order_relaxed) - 1;
    tail.store(at, std::memory_order_relaxed);
    --queued_;
    return submissions_[at & submission_mask_].user_data;
}

std::string why_no_ring(unsigned entries) {
    try {
        const Ring ring(entries);
        for (const std::uint8_t operation : {abi::operation_read, abi::operation_write, abi::operation_fsync}) {
            if (!ring.knows(operation)) {
                return "the kernel's io_uring lacks reads, writes or syncs (Linux 5.6 has them)";
            }
        }
        return "";
    } catch (const std::system_error& error) {
        switch (error.code().value()) {
            case ENOSYS:
                return "the kernel has no io_uring, or one older than Linux 5.6";
            case EPERM:
            case EACCES:
                return "io_uring is forbidden here: by sysctl kernel.io_uring_disabled, or by a container's seccomp profile";
            case ENOMEM:
                return "no locked memory for the rings of io_uring; raise ulimit -l";
            default:
                return std::string("io_uring cannot be set up: ") + error.what();
        }
    }
}

}  // namespace kvstore::io
