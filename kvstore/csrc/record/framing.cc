#include "framing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../checksum/crc32c.h"

namespace kvstore {
namespace {

constexpr char hex_digits[] = "0123456789abcdef";
constexpr char checksum_prefix[] = "crc32c:";
constexpr std::size_t checksum_prefix_bytes = sizeof checksum_prefix - 1;
static_assert(checksum_prefix_bytes + 2 * sizeof(std::uint32_t) == checksum_field_bytes);

void put_hex(std::byte* field, const std::array<std::byte, digest_bytes>& digest) {
    auto* text = reinterpret_cast<char*>(field);
    for (std::size_t i = 0; i < digest.size(); ++i) {
        const auto value = static_cast<unsigned>(digest[i]);
        text[2 * i] = hex_digits[value >> 4];
        text[2 * i + 1] = hex_digits[value & 0xF];
    }
}

void put_decimal(std::byte* field, std::size_t width, std::uint64_t value) {
    auto* text = reinterpret_cast<char*>(field);
    for (std::size_t i = width; i-- > 0; value /= 10) {
        text[i] = static_cast<char>('0' + value % 10);
    }
    if (value != 0) {
        std::memset(text, '9', width);
    }
}

void put_checksum(std::byte* field, std::uint32_t value) {
    auto* text = reinterpret_cast<char*>(field) + checksum_prefix_bytes;
    for (std::size_t i = 2 * sizeof value; i-- > 0; value >>= 4) {
        text[i] = hex_digits[value & 0xF];
    }
}

// Writes the header of a record whose checksum column lies at `column`.
void write_header(const FramingClass& framing, const RecordFields& fields, const RecordNumbers& numbers,
                  const std::byte* column, std::byte* header) {
    std::memcpy(header, framing.header_template.data(), framing.header_template.size());
    put_hex(header + framing.fields.key, fields.key);
    put_hex(header + framing.fields.parent, fields.parent);
    put_hex(header + framing.fields.grid, fields.grid);
    put_decimal(header + framing.fields.end_tokens, end_tokens_field_bytes, numbers.end_tokens);
    put_decimal(header + framing.fields.valid_tokens, valid_tokens_field_bytes, numbers.valid_tokens);
    put_decimal(header + framing.fields.cost_us, cost_us_field_bytes, numbers.cost_us);
    // The checksum field is blank while the header is checksummed.
    std::uint32_t value = crc32c(header, framing.header_template.size(), framing.schema_checksum);
    value = crc32c(column, framing.checksum_bytes, value);
    put_checksum(header + framing.fields.metadata_crc32c, value);
}

}  // namespace

void check_framing(const FramingClass& framing) {
    const auto lies_within = [&](std::uint64_t offset, std::size_t width) {
        return offset <= framing.header_template.size() && width <= framing.header_template.size() - offset;
    };
    const FieldOffsets& fields = framing.fields;
    if (!lies_within(fields.key, digest_field_bytes) || !lies_within(fields.parent, digest_field_bytes) ||
        !lies_within(fields.grid, digest_field_bytes) || !lies_within(fields.end_tokens, end_tokens_field_bytes) ||
        !lies_within(fields.valid_tokens, valid_tokens_field_bytes) ||
        !lies_within(fields.cost_us, cost_us_field_bytes) ||
        !lies_within(fields.metadata_crc32c, checksum_field_bytes)) {
        throw std::invalid_argument("frame_records: a field lies outside of the header of " +
                                    std::to_string(framing.header_template.size()) + " bytes");
    }
}

void frame_record(const FramingClass& framing, const RecordFields& fields, const RecordNumbers& numbers,
                  std::byte* record) {
    write_header(framing, fields, numbers, record + framing.checksum_offset, record);
    for (const Gap& gap : framing.gaps) {
        std::memset(record + gap.offset, 0, gap.size_bytes);
    }
}

bool is_intact(const FramingClass& framing, std::span<const PieceRange> pieces, const RecordFields& fields,
               const RecordNumbers& numbers, const std::byte* record) {
    const std::byte* column = record + framing.checksum_offset;
    std::vector<std::byte> header(framing.header_template.size());
    write_header(framing, fields, numbers, column, header.data());
    if (std::memcmp(record, header.data(), header.size()) != 0) {
        return false;
    }
    for (const Gap& gap : framing.gaps) {
        const std::byte* begin = record + gap.offset;
        if (std::any_of(begin, begin + gap.size_bytes, [](std::byte value) { return value != std::byte{0}; })) {
            return false;
        }
    }
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        std::uint32_t stored = 0;
        std::memcpy(&stored, column + i * sizeof stored, sizeof stored);
        if (crc32c(record + pieces[i].offset, pieces[i].size_bytes, 0) != stored) {
            return false;
        }
    }
    return true;
}

}  // namespace kvstore
