#pragma once

#include <nanobind/nanobind.h>

namespace kvstore::bindings {

void bind_arena(nanobind::module_& module);
void bind_checksum(nanobind::module_& module);
void bind_copy(nanobind::module_& module);
void bind_cpu(nanobind::module_& module);
void bind_record(nanobind::module_& module);
void bind_index(nanobind::module_& module);
void bind_io(nanobind::module_& module);
void bind_net_pieces(nanobind::module_& module);
void bind_net_stream(nanobind::module_& module);

}  // namespace kvstore::bindings
