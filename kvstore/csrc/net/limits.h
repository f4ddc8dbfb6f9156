// The limits of kvstore/limits.py that frames are checked against; tests/unit/test_native_net.py compares them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore::net {

inline constexpr std::size_t kib = 1024;
inline constexpr std::size_t mib = 1024 * kib;

inline constexpr std::size_t frame_header_bytes = 64;
inline constexpr std::size_t piece_row_bytes = 16;
inline constexpr std::size_t frame_payload_bytes_max = 16 * mib;
inline constexpr std::size_t frame_pieces_max = 4096;
inline constexpr std::size_t record_bytes_max = 64 * mib;
inline constexpr std::size_t handover_payload_bytes_max = 16 * mib;
inline constexpr std::size_t offer_records_max = std::size_t{1} << 18;

// Each slice of a frame has the whole no-progress deadline, so a slow link that moves this much is alive.
inline constexpr std::size_t slice_bytes = 512 * kib;

}  // namespace kvstore::net
