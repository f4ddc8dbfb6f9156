#include "record/framing.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "checksum/crc32c.h"

namespace kvstore {
namespace {

using testing::check;
using testing::throws;

constexpr std::size_t header_bytes = 512;
constexpr FieldOffsets offsets{16, 80, 144, 208, 220, 228, 244};

std::string text_at(const std::byte* record, std::size_t offset, std::size_t size) {
    return {reinterpret_cast<const char*>(record) + offset, size};
}

void fields_are_written() {
    std::vector<std::byte> header_template(header_bytes, std::byte{'.'});
    const std::string blank = "crc32c:00000000";
    std::memcpy(header_template.data() + offsets.metadata_crc32c, blank.data(), blank.size());
    const std::vector<Gap> gaps{{520, 8}, {540, 4}};
    const FramingClass framing{header_template, offsets, 0x1234, 528, 12, gaps};
    check_framing(framing);

    // The memory ends with the record, so that the address sanitizer sees a write past it.
    constexpr std::size_t record_bytes = 544;
    const auto record = std::make_unique<std::byte[]>(record_bytes);
    std::fill_n(record.get(), record_bytes, std::byte{0x5A});
    RecordFields fields{};
    for (std::size_t i = 0; i < digest_bytes; ++i) {
        fields.key[i] = static_cast<std::byte>(i);
        fields.parent[i] = static_cast<std::byte>(0xF0 + i);
    }
    frame_record(framing, fields, {300, 16, ~std::uint64_t{0}}, record.get());

    check(text_at(record.get(), offsets.key, 8) == "00010203", "key");
    check(text_at(record.get(), offsets.key + 56, 8) == "1c1d1e1f", "the key's end");
    check(text_at(record.get(), offsets.parent, 6) == "f0f1f2", "parent");
    check(text_at(record.get(), offsets.grid, 64) == std::string(64, '0'), "grid");
    check(text_at(record.get(), offsets.end_tokens, 12) == "000000000300", "end_tokens");
    check(text_at(record.get(), offsets.valid_tokens, 8) == "00000016", "valid_tokens");
    check(text_at(record.get(), offsets.cost_us, 16) == std::string(16, '9'), "a cost that is cut to its field");
    for (std::size_t at = 512; at < record_bytes; ++at) {
        const bool is_gap = (at >= 520 && at < 528) || at >= 540;
        check(record[at] == (is_gap ? std::byte{0} : std::byte{0x5A}), "byte " + std::to_string(at) + " of the body");
    }

    const std::string stored = text_at(record.get(), offsets.metadata_crc32c, checksum_field_bytes);
    std::memcpy(record.get() + offsets.metadata_crc32c, blank.data(), blank.size());
    const std::uint32_t expected =
        crc32c_portable(record.get() + 528, 12, crc32c_portable(record.get(), header_bytes, 0x1234));
    check(stored.substr(0, 7) == "crc32c:", "prefix of the checksum");
    check(std::stoul(stored.substr(7), nullptr, 16) == expected, "metadata checksum");
}

void damage_is_found() {
    std::vector<std::byte> header_template(header_bytes, std::byte{'.'});
    const std::string blank = "crc32c:00000000";
    std::memcpy(header_template.data() + offsets.metadata_crc32c, blank.data(), blank.size());
    const std::vector<Gap> gaps{{540, 4}};
    const std::vector<PieceRange> pieces{{512, 10}, {522, 10}};
    const FramingClass framing{header_template, offsets, 0x1234, 532, 8, gaps};
    constexpr std::size_t record_bytes = 544;
    const auto record = std::make_unique<std::byte[]>(record_bytes);
    std::fill_n(record.get(), record_bytes, std::byte{0x5A});
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const std::uint32_t value = crc32c_portable(record.get() + pieces[i].offset, pieces[i].size_bytes, 0);
        std::memcpy(record.get() + framing.checksum_offset + i * sizeof value, &value, sizeof value);
    }
    const RecordFields fields{};
    const RecordNumbers numbers{300, 16, 7};
    frame_record(framing, fields, numbers, record.get());
    check(is_intact(framing, pieces, fields, numbers, record.get()), "a framed record is intact");
    for (std::size_t at = 0; at < record_bytes; ++at) {
        record[at] ^= std::byte{1};
        check(!is_intact(framing, pieces, fields, numbers, record.get()), "damage at byte " + std::to_string(at));
        record[at] ^= std::byte{1};
    }
    check(!is_intact(framing, pieces, fields, {300, 16, 8}, record.get()), "a record of another cost");
}

void fields_outside_are_refused() {
    const std::vector<std::byte> header_template(header_bytes);
    for (const std::uint64_t offset : {std::uint64_t{header_bytes - 14}, std::uint64_t{header_bytes + 1}, ~std::uint64_t{0}}) {
        FramingClass framing{header_template, offsets, 0, 512, 4, {}};
        framing.fields.metadata_crc32c = offset;
        check(throws<std::invalid_argument>([&] { check_framing(framing); }, "lies outside of the header"), "outside");
    }
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::fields_are_written();
    kvstore::damage_is_found();
    kvstore::fields_outside_are_refused();
    std::cout << "framing: passed\n";
}
