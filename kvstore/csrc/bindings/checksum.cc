#include "../checksum/crc32c.h"

#include <memory>

#include "array.h"
#include "bindings.h"
#include "gil.h"
#include "buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

// Below this size giving the GIL up costs more than the work: about a microsecond of checksum.
constexpr std::size_t release_gil_bytes = 32 << 10;

std::uint32_t checksum_of_buffer(nb::handle data, std::uint32_t value) {
    const BufferView buffer(data);
    if (buffer.size_bytes() < release_gil_bytes) {
        return crc32c(buffer.data(), buffer.size_bytes(), value);
    }
    const GilReleased released;
    return crc32c(buffer.data(), buffer.size_bytes(), value);
}

using Checksums = nb::ndarray<nb::numpy, std::uint32_t, nb::ndim<1>>;

Checksums checksums_of_ranges(const AnyArray& address_array, const AnyArray& size_array) {
    const auto addresses = uint64_values(address_array, 0, "addresses");
    const auto sizes = uint64_values(size_array, 0, "sizes");
    if (addresses.size() != sizes.size()) {
        throw nb::value_error(("crc32c_many: " + std::to_string(addresses.size()) + " addresses but " +
                               std::to_string(sizes.size()) + " sizes")
                                  .c_str());
    }
    for (std::size_t i = 0; i < addresses.size(); ++i) {
        if (sizes[i] != 0 && (addresses[i] == 0 || addresses[i] + sizes[i] < addresses[i])) {
            const std::string range = "crc32c_many: range " + std::to_string(i);
            throw nb::value_error((range + " is null or runs past the end of the address space").c_str());
        }
    }
    auto checksums = std::make_unique<std::uint32_t[]>(addresses.size());
    {
        const GilReleased released;
        const Crc32cFunction function = active_crc32c_path().function;
        for (std::size_t i = 0; i < addresses.size(); ++i) {
            const auto address = static_cast<std::uintptr_t>(addresses[i]);
            checksums[i] = function(reinterpret_cast<const void*>(address), sizes[i], 0);
        }
    }
    // From here on the capsule frees them; `owner` exists before `checksums` lets go.
    const nb::capsule owner(checksums.get(),
                            [](void* values) noexcept { delete[] static_cast<std::uint32_t*>(values); });
    return Checksums(checksums.release(), {addresses.size()}, owner);
}

}  // namespace

void bind_checksum(nb::module_& module) {
    module.def("crc32c", &checksum_of_buffer, nb::arg("data"), nb::arg("value") = 0,
               nb::sig("def crc32c(data: Buffer | NDArray[Any], value: int = 0) -> int"),
               "CRC32C of a C-contiguous buffer, continued from `value`.\n\n"
               "crc32c(b, crc32c(a)) is the checksum of a followed by b. The GIL is released for large buffers.\n\n"
               "Raises:\n"
               "    TypeError: `data` has no buffer, or `value` is not an unsigned 32-bit integer.\n"
               "    BufferError: the buffer is not contiguous.");
    module.def("crc32c_many", &checksums_of_ranges, nb::arg("addresses"), nb::arg("sizes"),
               nb::sig("def crc32c_many(addresses: NDArray[np.uint64], sizes: NDArray[np.uint64])"
                       " -> NDArray[np.uint32]"),
               "CRC32C of each range of memory, shape [n]; the GIL is released.\n\n"
               "`addresses` (absolute) and `sizes` (bytes) are contiguous uint64 arrays of shape [n].\n"
               "The caller keeps the memory alive and has checked that each range lies inside it.\n\n"
               "Raises:\n"
               "    TypeError: not arrays of uint64.\n"
               "    ValueError: shapes differ or are not [n], or a range is null or wraps around.");
}

}  // namespace kvstore::bindings
