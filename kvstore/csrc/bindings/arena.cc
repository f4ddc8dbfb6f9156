#include "../arena/arena.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "../arena/slab_size.h"
#include "array.h"
#include "bindings.h"
#include "gil.h"
#include "buffer.h"
#include "value_buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

// Below this size giving the GIL up costs more than the copy.
constexpr std::size_t release_gil_bytes = 32 << 10;

std::uint64_t unsigned_item(PyObject* tuple, Py_ssize_t item) {
    const std::uint64_t value = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, item));
    if (value == static_cast<std::uint64_t>(-1) && PyErr_Occurred() != nullptr) {
        throw nb::python_error();
    }
    return value;
}

// A slot is a tuple (index, generation, size in bytes).
SlotHandle slot_of(nb::handle object) {
    if (!PyTuple_Check(object.ptr()) || PyTuple_Size(object.ptr()) != 3) {
        throw nb::type_error("a slot is a tuple of index, generation and size in bytes");
    }
    return {unsigned_item(object.ptr(), 0), unsigned_item(object.ptr(), 1), unsigned_item(object.ptr(), 2)};
}

// Many are rows of three 64-bit numbers. Copied: the array is the caller's to change.
static_assert(sizeof(SlotHandle) == 3 * sizeof(std::uint64_t));
std::vector<SlotHandle> slots_of(nb::handle rows) {
    const ValueBuffer buffer(rows);
    const auto slots = buffer.values<SlotHandle>("slots");
    return {slots.begin(), slots.end()};
}

std::unique_ptr<Arena> open_arena(std::uint64_t capacity_bytes, std::uint64_t largest_slot_bytes,
                                  const std::vector<std::uint64_t>& slot_sizes_bytes, const std::string& directory,
                                  const std::string& name) {
    const GilReleased released;  // clearing the memory takes a while
    const std::uint64_t slab_bytes = choose_slab_bytes(capacity_bytes, largest_slot_bytes, slot_sizes_bytes);
    std::shared_ptr<SharedMemory> memory = name.empty() ? SharedMemory::anonymous(capacity_bytes)
                                                        : SharedMemory::named(directory, name, capacity_bytes);
    return std::make_unique<Arena>(std::move(memory), capacity_bytes, slab_bytes);
}

nb::object allocate(Arena& arena, const std::vector<std::uint64_t>& sizes_bytes) {
    std::vector<SlotHandle> slots;
    if (!arena.allocate(sizes_bytes, slots, false)) {
        const GilReleased released;
        if (!arena.allocate(sizes_bytes, slots, true)) {
            slots.clear();
        }
    }
    if (slots.size() != sizes_bytes.size()) {
        return nb::none();
    }
    return bytes_of(std::span<const SlotHandle>(slots));
}

using Memory = nb::ndarray<nb::memview, std::uint8_t, nb::ndim<1>, nb::c_contig>;
using Locations = nb::ndarray<nb::numpy, std::uint64_t, nb::ndim<1>>;

std::shared_ptr<SharedMemory> memory_of(Arena& arena) {
    std::shared_ptr<SharedMemory> memory = arena.memory();
    if (!memory) {
        throw ArenaClosed("the arena is closed; open the store again");
    }
    return memory;
}

// Every view of it keeps the mapping alive, also after the arena was closed.
Memory whole_memory(Arena& arena) {
    auto memory = std::make_unique<std::shared_ptr<SharedMemory>>(memory_of(arena));
    auto* data = reinterpret_cast<std::uint8_t*>((*memory)->data());
    const std::size_t size_bytes = (*memory)->size_bytes();
    const nb::capsule owner(memory.get(), [](void* kept) noexcept {
        const std::unique_ptr<std::shared_ptr<SharedMemory>> last(static_cast<std::shared_ptr<SharedMemory>*>(kept));
    });
    static_cast<void>(memory.release());
    return Memory(data, {size_bytes}, owner);
}

Locations locations(Arena& arena, nb::handle slots) {
    auto found = std::make_unique<std::vector<std::uint64_t>>(arena.locations(slots_of(slots)));
    std::uint64_t* data = found->data();
    const std::size_t count = found->size();
    const nb::capsule owner(found.get(), [](void* kept) noexcept {
        const std::unique_ptr<std::vector<std::uint64_t>> last(static_cast<std::vector<std::uint64_t>*>(kept));
    });
    static_cast<void>(found.release());
    return Locations(data, {count}, owner);
}

void write(Arena& arena, nb::handle slot, nb::handle data, std::int64_t offset) {
    const BufferView source(data, PyBUF_SIMPLE);
    const SlotHandle handle = slot_of(slot);
    const auto* bytes = static_cast<const std::byte*>(source.data());
    if (source.size_bytes() < release_gil_bytes) {
        return arena.write(handle, bytes, source.size_bytes(), offset);
    }
    const GilReleased released;
    arena.write(handle, bytes, source.size_bytes(), offset);
}

void read(Arena& arena, nb::handle slot, nb::handle into, std::int64_t offset) {
    const BufferView target(into, PyBUF_WRITABLE);
    const SlotHandle handle = slot_of(slot);
    auto* bytes = static_cast<std::byte*>(target.data());
    if (target.size_bytes() < release_gil_bytes) {
        return arena.read(handle, bytes, target.size_bytes(), offset);
    }
    const GilReleased released;
    arena.read(handle, bytes, target.size_bytes(), offset);
}

nb::dict statistics(Arena& arena) {
    const ArenaUsage usage = arena.usage(true);
    nb::dict result;
    result["used_bytes"] = usage.used_bytes;
    result["quarantined_bytes"] = usage.quarantined_bytes;
    result["relocated_bytes"] = usage.relocated_bytes;
    result["slab_bytes"] = arena.slab_bytes();
    result["slabs"] = usage.slabs;
    result["empty_slabs"] = usage.empty_slabs;
    nb::list classes;
    for (const ClassUsage& each : usage.classes) {
        classes.append(nb::make_tuple(each.slot_bytes, each.slabs, each.live_slots, each.quarantined_slots,
                                      each.free_places));
    }
    result["classes"] = classes;
    return result;
}

// The library's own errors, so that callers need not know where a tier is written.
void translate(const std::exception_ptr& pointer, void* /*unused*/) {
    const auto raise = [](const char* name, const std::exception& error) {
        PyErr_SetString(nb::module_::import_("kvstore.errors").attr(name).ptr(), error.what());
    };
    try {
        std::rethrow_exception(pointer);
    } catch (const StaleSlot& error) {
        raise("StaleSlotError", error);
    } catch (const ArenaClosed& error) {
        raise("StoreClosedError", error);
    } catch (const ArenaError& error) {
        raise("ArenaError", error);
    }
}

}  // namespace

void bind_arena(nb::module_& module) {
    nb::register_exception_translator(translate);
    nb::class_<Arena>(module, "Arena",
                      "Slots in shared memory; see kvstore.tiers.ArenaTier. Any thread may call.\n\n"
                      "A slot is a tuple (index, generation, size in bytes); several are rows of these, uint64.")
        .def(nb::new_(&open_arena), nb::arg("capacity_bytes"), nb::arg("largest_slot_bytes"),
             nb::arg("slot_sizes_bytes"), nb::arg("directory"), nb::arg("name"))
        .def("allocate", &allocate, nb::arg("sizes_bytes"))
        .def(
            "would_fit",
            [](Arena& arena, const std::vector<std::uint64_t>& sizes_bytes, nb::handle freeing) {
                return arena.would_fit(sizes_bytes, slots_of(freeing));
            },
            nb::arg("sizes_bytes"), nb::arg("freeing"))
        .def(
            "fits_when_empty",
            [](Arena& arena, const std::vector<std::uint64_t>& sizes_bytes) {
                return arena.fits_when_empty(sizes_bytes);
            },
            nb::arg("sizes_bytes"))
        .def("free", [](Arena& arena, nb::handle slots) { arena.free(slots_of(slots)); }, nb::arg("slots"))
        .def("pin", [](Arena& arena, nb::handle slots) { arena.pin(slots_of(slots)); }, nb::arg("slots"))
        .def("unpin", [](Arena& arena, nb::handle slots) { arena.unpin(slots_of(slots)); }, nb::arg("slots"))
        .def(
            "location",
            [](Arena& arena, nb::handle slot, bool must_be_pinned) {
                return arena.location(slot_of(slot), must_be_pinned);
            },
            nb::arg("slot"), nb::arg("must_be_pinned"))
        .def("locations", &locations, nb::arg("slots"))
        .def("write", &write, nb::arg("slot"), nb::arg("data"), nb::arg("offset"))
        .def("read", &read, nb::arg("slot"), nb::arg("into"), nb::arg("offset"))
        .def("memory", &whole_memory)
        .def("statistics", &statistics)
        .def("check", &Arena::check)
        .def("close", &Arena::close)
        .def_prop_ro("used_bytes", [](Arena& arena) { return arena.usage(false).used_bytes; })
        .def_prop_ro("quarantined_bytes", [](Arena& arena) { return arena.usage(false).quarantined_bytes; })
        .def_prop_ro("slab_bytes", &Arena::slab_bytes)
        .def_prop_ro("is_closed", &Arena::is_closed)
        .def_prop_ro("descriptor",
                     [](Arena& arena) {
                         return memory_of(arena)->descriptor();
                     })
        .def_prop_ro("path", [](Arena& arena) { return memory_of(arena)->path(); })
        .def_prop_ro("huge_pages", [](Arena& arena) {
            const HugePages pages = memory_of(arena)->huge_pages();
            return nb::make_tuple(pages.in_use, pages.why_not);
        });
}

}  // namespace kvstore::bindings
