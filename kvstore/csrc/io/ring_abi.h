// The part of Linux's io_uring interface that is used here, as in <linux/io_uring.h>: that header is missing or old on many
// machines where this is built, and the layout never changes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore::io::abi {

inline constexpr long setup_call = 425;
inline constexpr long enter_call = 426;
inline constexpr long register_call = 427;

inline constexpr std::uint32_t setup_coop_taskrun = 1U << 8;
inline constexpr std::uint32_t feature_single_mmap = 1U << 0;
inline constexpr std::uint32_t feature_nodrop = 1U << 1;
inline constexpr std::uint32_t enter_getevents = 1U << 0;
inline constexpr std::uint32_t fsync_datasync = 1U << 0;

inline constexpr std::uint64_t offset_of_rings = 0;
inline constexpr std::uint64_t offset_of_entries = 0x10000000ULL;

inline constexpr std::uint8_t operation_fsync = 3;
inline constexpr std::uint8_t operation_read = 22;
inline constexpr std::uint8_t operation_write = 23;
inline constexpr unsigned register_probe = 8;
inline constexpr std::uint16_t probe_supported = 1U << 0;

struct SubmissionOffsets {
    std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
    std::uint64_t user_address;
};

struct CompletionOffsets {
    std::uint32_t head, tail, ring_mask, ring_entries, overflow, entries, flags, reserved;
    std::uint64_t user_address;
};

struct Parameters {
    std::uint32_t submission_entries, completion_entries, flags, thread_cpu, thread_idle, features, queue_descriptor;
    std::uint32_t reserved[3];
    SubmissionOffsets submission;
    CompletionOffsets completion;
};
static_assert(sizeof(Parameters) == 120);

struct Submission {
    std::uint8_t operation, flags;
    std::uint16_t priority;
    std::int32_t descriptor;
    std::uint64_t offset, address;
    std::uint32_t size_bytes, operation_flags;
    std::uint64_t user_data;
    std::uint64_t reserved[3];
};
static_assert(sizeof(Submission) == 64 && offsetof(Submission, user_data) == 32);

struct Completion {
    std::uint64_t user_data;
    std::int32_t result;
    std::uint32_t flags;
};
static_assert(sizeof(Completion) == 16);

struct ProbeOperation {
    std::uint8_t operation, reserved;
    std::uint16_t flags;
    std::uint32_t more_reserved;
};

struct Probe {
    std::uint8_t last_operation, count;
    std::uint16_t reserved;
    std::uint32_t more_reserved[3];
    ProbeOperation operations[256];
};
static_assert(sizeof(Probe) == 16 + 256 * 8);

}  // namespace kvstore::io::abi
