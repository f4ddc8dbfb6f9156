// Checked access to arrays that Python passes in: one clear error instead of an overload listing.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <span>
#include <string>

namespace kvstore::bindings {

using AnyArray = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;

// The values of a C-contiguous uint64 array of shape [n] (columns == 0) or [n, columns].
// Throws nanobind::type_error for another dtype, nanobind::value_error for another shape or layout.
inline std::span<const std::uint64_t> uint64_values(const AnyArray& array, std::size_t columns, const char* name) {
    const std::string shape_wanted = columns == 0 ? "[n]" : "[n, " + std::to_string(columns) + "]";
    const std::string expected = std::string(name) + " must be a contiguous uint64 array of shape " + shape_wanted;
    if (array.dtype() != nanobind::dtype<std::uint64_t>()) {
        throw nanobind::type_error((expected + "; its dtype differs").c_str());
    }
    const std::size_t dimensions = columns == 0 ? 1 : 2;
    if (array.ndim() != dimensions || (columns != 0 && array.shape(1) != columns)) {
        std::string shape;
        for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
            shape += (axis == 0 ? "" : ", ") + std::to_string(array.shape(axis));
        }
        throw nanobind::value_error((expected + "; its shape is [" + shape + "]").c_str());
    }
    std::int64_t stride = 1;
    // The strides of an empty array mean nothing.
    for (std::size_t axis = array.size() == 0 ? 0 : dimensions; axis-- > 0;) {
        if (array.shape(axis) > 1 && array.stride(axis) != stride) {
            throw nanobind::value_error((expected + "; it is strided").c_str());
        }
        stride *= static_cast<std::int64_t>(array.shape(axis));
    }
    return {static_cast<const std::uint64_t*>(array.data()), array.size()};
}

}  // namespace kvstore::bindings
