// Where the pieces of a transfer's records lie: addresses of records, and a layout shared by records of one class.
//
// The memory belongs to the caller, who keeps it in place while bytes move and has checked that layouts fit records.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace kvstore::net {

struct PieceLayout {
    std::vector<std::uint64_t> offsets;  // of each piece, from the record's first byte on
    std::vector<std::uint32_t> sizes;
    std::uint64_t checksum_offset = 0;  // of the column of the pieces' CRC32C

    std::size_t piece_count() const { return offsets.size(); }
};

struct RecordPlace {
    std::shared_ptr<const PieceLayout> layout;
    std::byte* address = nullptr;

    std::byte* piece(std::size_t number) const { return address + layout->offsets[number]; }
    std::uint32_t checksum(std::size_t number) const {
        std::uint32_t value = 0;
        std::memcpy(&value, address + layout->checksum_offset + number * sizeof(value), sizeof(value));
        return value;
    }
    void set_checksum(std::size_t number, std::uint32_t value) const {
        std::memcpy(address + layout->checksum_offset + number * sizeof(value), &value, sizeof(value));
    }
};

}  // namespace kvstore::net
