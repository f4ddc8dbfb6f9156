#include <cstring>
#include <string>

#include "../record/framing.h"
#include "array.h"
#include "bindings.h"
#include "buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

constexpr std::size_t numbers_columns = sizeof(RecordNumbers) / sizeof(std::uint64_t);
constexpr std::size_t class_values = sizeof(FieldOffsets) / sizeof(std::uint64_t) + 3;

void run_frame_records(nb::handle header_template, const AnyArray& class_array, const AnyArray& gap_array,
                       const AnyArray& address_array, nb::handle digest_buffer, const AnyArray& number_array) {
    const BufferView header(header_template);
    const BufferView digests(digest_buffer);
    const auto record_class = uint64_values(class_array, 0, "record_class");
    const auto gaps = uint64_values(gap_array, 2, "gaps");
    const auto addresses = uint64_values(address_array, 0, "addresses");
    const auto numbers = uint64_values(number_array, numbers_columns, "numbers");
    if (record_class.size() != class_values || numbers.size() != numbers_columns * addresses.size() ||
        digests.size_bytes() != sizeof(RecordFields) * addresses.size()) {
        throw nb::value_error(("frame_records: " + std::to_string(addresses.size()) + " records, but " +
                               std::to_string(numbers.size() / numbers_columns) + " rows of numbers and " +
                               std::to_string(digests.size_bytes()) + " bytes of digests, for a class of " +
                               std::to_string(record_class.size()) + " values")
                                  .c_str());
    }
    FramingClass framing{};
    std::memcpy(&framing.fields, record_class.data(), sizeof framing.fields);
    framing.schema_checksum = static_cast<std::uint32_t>(record_class[class_values - 3]);
    framing.checksum_offset = record_class[class_values - 2];
    framing.checksum_bytes = record_class[class_values - 1];
    framing.header_template = {static_cast<const std::byte*>(header.data()), header.size_bytes()};
    framing.gaps = {reinterpret_cast<const Gap*>(gaps.data()), gaps.size() / 2};
    const nb::gil_scoped_release released;
    check_framing(framing);
    for (const std::uint64_t address : addresses) {
        if (address == 0) {
            throw std::invalid_argument("frame_records: a record's address is null");
        }
    }
    for (std::size_t i = 0; i < addresses.size(); ++i) {
        RecordFields fields{};
        std::memcpy(&fields, static_cast<const std::byte*>(digests.data()) + i * sizeof fields, sizeof fields);
        RecordNumbers of_record{};
        std::memcpy(&of_record, numbers.data() + i * numbers_columns, sizeof of_record);
        frame_record(framing, fields, of_record,
                     reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(addresses[i])));
    }
}

}  // namespace

void bind_record(nb::module_& module) {
    module.def("frame_records", &run_frame_records, nb::arg("header_template"), nb::arg("record_class"),
               nb::arg("gaps"), nb::arg("addresses"), nb::arg("digests"), nb::arg("numbers"),
               nb::sig("def frame_records(header_template: Buffer, record_class: NDArray[np.uint64],"
                       " gaps: NDArray[np.uint64], addresses: NDArray[np.uint64], digests: Buffer,"
                       " numbers: NDArray[np.uint64]) -> None"),
               "Writes the framing of records of one class where they lie; the GIL is released.\n\n"
               "Args:\n"
               "    header_template: the class's header with blank fields.\n"
               "    record_class: shape [10]: offsets of the fields key, parent, grid, end_tokens, valid_tokens,\n"
               "        cost_us and metadata_crc32c; checksum of the schema; offset and bytes of the checksum column.\n"
               "    gaps: offset and bytes of each gap of the body, shape [g, 2].\n"
               "    addresses: of the records, shape [n].\n"
               "    digests: n times 96 bytes: key, parent, grid.\n"
               "    numbers: end_tokens, valid_tokens, cost_us, shape [n, 3].\n\n"
               "Raises:\n"
               "    TypeError: another kind of array.\n"
               "    ValueError: shapes that contradict each other, a field outside of the header, a null address.");
}

}  // namespace kvstore::bindings
