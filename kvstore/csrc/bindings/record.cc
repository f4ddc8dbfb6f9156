#include <cstring>
#include <memory>
#include <string>

#include "../copy/shares.h"
#include "../record/framing.h"
#include "array.h"
#include "bindings.h"
#include "gil.h"
#include "buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

constexpr std::size_t numbers_columns = sizeof(RecordNumbers) / sizeof(std::uint64_t);
constexpr std::size_t class_values = sizeof(FieldOffsets) / sizeof(std::uint64_t) + 3;

// Records of one class, as both functions here take them.
class Records {
  public:
    Records(const char* function, nb::handle header_template, const AnyArray& class_array, const AnyArray& gap_array,
            const AnyArray& address_array, nb::handle digest_buffer, const AnyArray& number_array)
        : header_(header_template),
          digests_(digest_buffer),
          numbers_(uint64_values(number_array, numbers_columns, "numbers")),
          addresses(uint64_values(address_array, 0, "addresses")) {
        const auto record_class = uint64_values(class_array, 0, "record_class");
        const auto gaps = uint64_values(gap_array, 2, "gaps");
        if (record_class.size() != class_values || numbers_.size() != numbers_columns * addresses.size() ||
            digests_.size_bytes() != sizeof(RecordFields) * addresses.size()) {
            throw nb::value_error((std::string(function) + ": " + std::to_string(addresses.size()) +
                                   " records, but " + std::to_string(numbers_.size() / numbers_columns) +
                                   " rows of numbers and " + std::to_string(digests_.size_bytes()) +
                                   " bytes of digests, for a class of " + std::to_string(record_class.size()) +
                                   " values")
                                      .c_str());
        }
        std::memcpy(&framing.fields, record_class.data(), sizeof framing.fields);
        framing.schema_checksum = static_cast<std::uint32_t>(record_class[class_values - 3]);
        framing.checksum_offset = record_class[class_values - 2];
        framing.checksum_bytes = record_class[class_values - 1];
        framing.header_template = {static_cast<const std::byte*>(header_.data()), header_.size_bytes()};
        framing.gaps = {reinterpret_cast<const Gap*>(gaps.data()), gaps.size() / 2};
        check_framing(framing);
        for (const std::uint64_t address : addresses) {
            if (address == 0) {
                throw std::invalid_argument(std::string(function) + ": a record's address is null");
            }
        }
    }

    RecordFields fields(std::size_t record) const {
        RecordFields found{};
        std::memcpy(&found, static_cast<const std::byte*>(digests_.data()) + record * sizeof found, sizeof found);
        return found;
    }

    RecordNumbers numbers(std::size_t record) const {
        RecordNumbers found{};
        std::memcpy(&found, numbers_.data() + record * numbers_columns, sizeof found);
        return found;
    }

    std::byte* memory(std::size_t record) const {
        return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(addresses[record]));
    }

  private:
    BufferView header_;
    BufferView digests_;
    std::span<const std::uint64_t> numbers_;

  public:
    std::span<const std::uint64_t> addresses;
    FramingClass framing{};
};

void run_frame_records(nb::handle header_template, const AnyArray& class_array, const AnyArray& gap_array,
                       const AnyArray& address_array, nb::handle digest_buffer, const AnyArray& number_array) {
    const Records records("frame_records", header_template, class_array, gap_array, address_array, digest_buffer,
                          number_array);
    const GilReleased released;
    for (std::size_t i = 0; i < records.addresses.size(); ++i) {
        frame_record(records.framing, records.fields(i), records.numbers(i), records.memory(i));
    }
}

using Flags = nb::ndarray<nb::numpy, bool, nb::ndim<1>>;

Flags run_intact_records(nb::handle header_template, const AnyArray& class_array, const AnyArray& gap_array,
                         const AnyArray& piece_array, const AnyArray& address_array, nb::handle digest_buffer,
                         const AnyArray& number_array, unsigned threads) {
    const Records records("intact_records", header_template, class_array, gap_array, address_array, digest_buffer,
                          number_array);
    const auto ranges = uint64_values(piece_array, 2, "pieces");
    const std::span<const PieceRange> pieces(reinterpret_cast<const PieceRange*>(ranges.data()), ranges.size() / 2);
    if (pieces.size() * sizeof(std::uint32_t) > records.framing.checksum_bytes) {
        throw nb::value_error(("intact_records: " + std::to_string(pieces.size()) + " pieces, but checksums of " +
                               std::to_string(records.framing.checksum_bytes) + " bytes")
                                  .c_str());
    }
    const std::size_t count = records.addresses.size();
    auto flags = std::make_unique<bool[]>(count);
    {
        const GilReleased released;
        run_shares(count, threads, [&](std::size_t i) {
            flags[i] = is_intact(records.framing, pieces, records.fields(i), records.numbers(i), records.memory(i));
        });
    }
    const nb::capsule owner(flags.get(), [](void* values) noexcept { delete[] static_cast<bool*>(values); });
    return Flags(flags.release(), {count}, owner);
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
               "        cost_us and metadata_crc32c; checksum of the schema; offset and bytes of the checksum column,\n"
               "        with what lies behind it that the metadata checksum covers, too.\n"
               "    gaps: offset and bytes of each gap of the body, shape [g, 2].\n"
               "    addresses: of the records, shape [n].\n"
               "    digests: n times 96 bytes: key, parent, grid.\n"
               "    numbers: end_tokens, valid_tokens, cost_us, shape [n, 3].\n\n"
               "Raises:\n"
               "    TypeError: another kind of array.\n"
               "    ValueError: shapes that contradict each other, a field outside of the header, a null address.");
    module.def("intact_records", &run_intact_records, nb::arg("header_template"), nb::arg("record_class"),
               nb::arg("gaps"), nb::arg("pieces"), nb::arg("addresses"), nb::arg("digests"), nb::arg("numbers"),
               nb::kw_only(), nb::arg("threads") = 1,
               nb::sig("def intact_records(header_template: Buffer, record_class: NDArray[np.uint64],"
                       " gaps: NDArray[np.uint64], pieces: NDArray[np.uint64], addresses: NDArray[np.uint64],"
                       " digests: Buffer, numbers: NDArray[np.uint64], *, threads: int = 1) -> NDArray[np.bool_]"),
               "Whether each record is byte for byte what `frame_records` would write there, its gaps are zero, and\n"
               "its pieces have the checksums of its column, shape [n]; the GIL is released.\n\n"
               "Arguments as for `frame_records`, and:\n"
               "    pieces: offset and bytes of each piece, in the order of the checksum column, shape [p, 2].\n"
               "    threads: at most so many share the work, the caller's included.\n\n"
               "Raises:\n"
               "    TypeError, ValueError: as `frame_records`, or more pieces than checksums.");
}

}  // namespace kvstore::bindings
