#include "../copy/copy_rows.h"

#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>

#include "../copy/shares.h"
#include "array.h"
#include "bindings.h"
#include "gil.h"
#include "buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

CopyOptions options_of(unsigned threads, std::optional<bool> streams) {
    constexpr unsigned threads_max = helper_threads_max;
    if (threads < 1 || threads > threads_max) {
        throw nb::value_error(
            ("threads must be 1 to " + std::to_string(threads_max) + ", not " + std::to_string(threads)).c_str());
    }
    return {active_copy_kernels(), threads, streams};
}

// Runs `function` over the entries of a plan array, without the GIL.
template <typename Entry>
void run_plan(void (*function)(std::span<const Entry>, const CopyOptions&), const AnyArray& plan_array,
              const CopyOptions& options) {
    constexpr std::size_t columns = sizeof(Entry) / sizeof(std::uint64_t);
    const auto values = uint64_values(plan_array, columns, "plan");
    const std::span<const Entry> plan(reinterpret_cast<const Entry*>(values.data()), values.size() / columns);
    const GilReleased released;
    check_plan(plan);
    function(plan, options);
}

void run_copy_rows(const AnyArray& plan, unsigned threads, std::optional<bool> streams) {
    run_plan<RowCopy>(&copy_rows, plan, options_of(threads, streams));
}

void run_copy_rows_crc32c(const AnyArray& plan, unsigned threads, std::optional<bool> streams) {
    run_plan<PieceCopy>(&copy_rows_crc32c, plan, options_of(threads, streams));
}

void run_crc32c_in_place(const AnyArray& plan, unsigned threads) {
    run_plan<PieceInPlace>(&crc32c_in_place, plan, options_of(threads, false));
}

using Addresses = nb::ndarray<nb::numpy, std::uint64_t, nb::ndim<1>>;

Addresses addresses_of_buffers(const nb::sequence& buffers) {
    const std::size_t count = nb::len(buffers);
    auto addresses = std::make_unique<std::uint64_t[]>(count);
    for (std::size_t i = 0; i < count; ++i) {
        const BufferView buffer(buffers[i]);
        addresses[i] = reinterpret_cast<std::uintptr_t>(buffer.data());
    }
    // From here on the capsule frees them; `owner` exists before `addresses` lets go.
    const nb::capsule owner(addresses.get(),
                            [](void* values) noexcept { delete[] static_cast<std::uint64_t*>(values); });
    return Addresses(addresses.release(), {count}, owner);
}

}  // namespace

void bind_copy(nb::module_& module) {
    module.def("copy_rows", &run_copy_rows, nb::arg("plan"), nb::kw_only(), nb::arg("threads") = 1,
               nb::arg("streams") = nb::none(),
               nb::sig("def copy_rows(plan: NDArray[np.uint64], *, threads: int = 1, streams: bool | None = None)"
                       " -> None"),
               "Copies rows of bytes by a plan, a contiguous uint64 array of shape [n, 6]; the GIL is released.\n\n"
               "Columns: destination, source, rows, row_bytes, destination_stride, source_stride. Addresses are\n"
               "absolute, strides are bytes. An entry whose strides both equal row_bytes is one copy. The whole plan\n"
               "is checked before a byte moves. The caller keeps the memory alive and has checked that each region\n"
               "lies inside it.\n\n"
               "Args:\n"
               "    threads: at most so many, the caller's included, share the work. With more than one, destinations\n"
               "        must not overlap.\n"
               "    streams: store past the caches; None decides by the plan's size.\n\n"
               "Raises:\n"
               "    TypeError: not an array of uint64.\n"
               "    ValueError: the shape is not [n, 6], or an entry has a null address, a stride smaller than its\n"
               "        row, a region past the end of the address space, or overlapping source and destination; or\n"
               "        `threads` is out of range.");
    module.def("copy_rows_crc32c", &run_copy_rows_crc32c, nb::arg("plan"), nb::kw_only(), nb::arg("threads") = 1,
               nb::arg("streams") = nb::none(),
               nb::sig("def copy_rows_crc32c(plan: NDArray[np.uint64], *, threads: int = 1,"
                       " streams: bool | None = None) -> None"),
               "As `copy_rows`, by a plan of shape [n, 7] that also says where checksums go.\n\n"
               "Column 6 is the address of a uint32 of any alignment, or 0: it takes the CRC32C of the entry's bytes\n"
               "in the order of its rows, computed while they are copied. Consecutive entries with the same address\n"
               "make one piece, whose checksum runs on from entry to entry.\n\n"
               "Raises:\n"
               "    TypeError, ValueError: as `copy_rows`.");
    module.def("crc32c_in_place", &run_crc32c_in_place, nb::arg("plan"), nb::kw_only(), nb::arg("threads") = 1,
               nb::sig("def crc32c_in_place(plan: NDArray[np.uint64], *, threads: int = 1) -> None"),
               "Stores the CRC32C of ranges of memory, by a contiguous uint64 plan of shape [n, 3]; the GIL is\n"
               "released.\n\n"
               "Columns: address, size in bytes, address of the uint32 of any alignment that takes the checksum.\n\n"
               "Raises:\n"
               "    TypeError: not an array of uint64.\n"
               "    ValueError: the shape is not [n, 3], a range is null or wraps around, a checksum has no place, or\n"
               "        `threads` is out of range.");
    module.def("addresses_of", &addresses_of_buffers, nb::arg("buffers"),
               nb::sig("def addresses_of(buffers: Sequence[Buffer]) -> NDArray[np.uint64]"),
               "Address of the first byte of each buffer, shape [n]. The caller keeps the buffers alive.\n\n"
               "Raises:\n"
               "    TypeError: not a sequence of buffers.\n"
               "    BufferError: a buffer is not contiguous.");
}

}  // namespace kvstore::bindings
