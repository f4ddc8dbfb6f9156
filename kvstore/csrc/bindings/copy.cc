#include "../copy/copy_rows.h"

#include "array.h"
#include "bindings.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

constexpr std::size_t plan_columns = sizeof(RowCopy) / sizeof(std::uint64_t);

void run_plan(const AnyArray& plan_array) {
    const auto values = uint64_values(plan_array, plan_columns, "plan");
    const std::span<const RowCopy> plan(reinterpret_cast<const RowCopy*>(values.data()), values.size() / plan_columns);
    const nb::gil_scoped_release released;
    check_plan(plan);
    copy_rows(plan);
}

}  // namespace

void bind_copy(nb::module_& module) {
    module.def("copy_rows", &run_plan, nb::arg("plan"),
               nb::sig("def copy_rows(plan: NDArray[np.uint64]) -> None"),
               "Copies rows of bytes by a plan, a contiguous uint64 array of shape [n, 6]; the GIL is released.\n\n"
               "Columns: destination, source, rows, row_bytes, destination_stride, source_stride. Addresses are\n"
               "absolute, strides are bytes. An entry whose strides both equal row_bytes is one copy. The whole plan\n"
               "is checked before a byte moves. The caller keeps the memory alive and has checked that each region\n"
               "lies inside it.\n\n"
               "Raises:\n"
               "    TypeError: not an array of uint64.\n"
               "    ValueError: the shape is not [n, 6], or an entry has a null address, a stride smaller than its\n"
               "        row, a region past the end of the address space, or overlapping source and destination.");
}

}  // namespace kvstore::bindings
