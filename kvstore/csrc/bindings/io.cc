#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "../io/batch.h"
#include "../io/engine.h"
#include "../io/engine_choice.h"
#include "array.h"
#include "bindings.h"
#include "gil.h"
#include "value_buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

using EnginePointer = std::shared_ptr<io::Engine>;
using BatchPointer = std::shared_ptr<io::Batch>;

// A signal's handler runs at least this often during a wait.
constexpr auto wait_slice = std::chrono::milliseconds(100);

void translate(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const io::ClosedError& error) {
        const nb::object type = nb::module_::import_("kvstore.errors").attr("StoreClosedError");
        PyErr_SetString(type.ptr(), error.what());
    }
}

[[noreturn]] void raise_os_error(const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

// Python's own pointer: the end of an engine waits for what has been begun, and others may run meanwhile.
EnginePointer kept_by_python(EnginePointer engine) {
    io::Engine* const kept = engine.get();
    return EnginePointer(kept, [engine = std::move(engine)](io::Engine*) mutable {
        if (!engine->is_inherited()) {
            const GilReleased released;
            engine->close();
        }
        engine.reset();
    });
}

EnginePointer make_engine(const std::string& name, unsigned depth, unsigned urgent_depth, std::uint64_t piece_bytes) {
    if (depth == 0 || depth > io::depth_max || urgent_depth > io::depth_max || piece_bytes == 0 ||
        piece_bytes % io::align_bytes != 0 || piece_bytes > (1U << 30)) {
        throw nb::value_error("an engine has a depth, 4096 at most, and pieces of a multiple of 4096 bytes, 1 GiB at most");
    }
    try {
        return kept_by_python(io::Engine::make(
            io::mover_of(name), {.depth = depth, .urgent_depth = urgent_depth, .piece_bytes = piece_bytes}));
    } catch (const std::system_error& error) {
        raise_os_error(error);
    }
}

void check_not_inherited(bool is_inherited) {
    if (is_inherited) {
        throw io::ClosedError("the files are closed: they belong to the process that forked this one");
    }
}

BatchPointer submit(io::Engine& engine, const AnyArray& operations, bool is_urgent) {
    check_not_inherited(engine.is_inherited());
    const auto values = uint64_values(operations, 5, "operations");
    if (values.size() / 5 > io::batch_operations_max) {
        throw std::invalid_argument("a batch has at most " + std::to_string(io::batch_operations_max) + " operations, not " +
                                    std::to_string(values.size() / 5));
    }
    // A copy: nobody can change it between the look at a row and its use.
    const auto* const first = reinterpret_cast<const io::Row*>(values.data());
    const std::vector<io::Row> rows(first, first + values.size() / 5);
    const GilReleased released;
    return engine.submit(rows, is_urgent);
}

void close_engine(io::Engine& engine) {
    if (engine.is_inherited()) {
        return;
    }
    const GilReleased released;
    engine.close();
}

std::size_t wait(io::Batch& batch, std::size_t count, double until_s) {
    check_not_inherited(batch.is_inherited());
    constexpr double longest_s = 1e9;
    // Of a NaN, which compares with nothing, this makes the past.
    const double bounded_s = until_s > 0 ? std::min(until_s, longest_s) : 0;
    const auto until = io::Clock::time_point(
        std::chrono::duration_cast<io::Clock::duration>(std::chrono::duration<double>(bounded_s)));
    while (true) {
        std::size_t ended = 0;
        {
            const GilReleased released;
            ended = batch.wait(count, std::min(until, io::Clock::now() + wait_slice));
        }
        if (ended >= count || io::Clock::now() >= until) {
            return ended;
        }
        if (PyErr_CheckSignals() != 0) {
            throw nb::python_error();
        }
    }
}

void bind_engine(nb::module_& module) {
    nb::class_<io::Engine>(module, "FileEngine", "Moves bytes between files and memory on threads of its own. Any thread.")
        .def(nb::new_(&make_engine), nb::arg("name"), nb::arg("depth"), nb::arg("urgent_depth"), nb::arg("piece_bytes"),
             "`name` is one of `file_engines`. Raises OSError when the system does not give what it needs.")
        .def(
            "add_file",
            [](io::Engine& engine, int descriptor) {
                check_not_inherited(engine.is_inherited());
                return engine.add_file(descriptor);
            },
            nb::arg("descriptor"), "A number for an open descriptor, which stays the caller's.")
        .def(
            "remove_file",
            [](io::Engine& engine, std::uint64_t file) {
                check_not_inherited(engine.is_inherited());
                engine.remove_file(file);
            },
            nb::arg("file"), "The number ends. ValueError while its operations have not ended.")
        .def("submit", &submit, nb::arg("operations"), nb::arg("is_urgent"),
             nb::sig("def submit(self, operations: NDArray[np.uint64], is_urgent: bool) -> FileEngineBatch"),
             "Rows of `kvstore.abc.files.Files.submit`. Raises ValueError; nothing was begun.")
        .def(
            "cancel",
            [](io::Engine& engine, io::Batch& batch) {
                check_not_inherited(engine.is_inherited());
                const GilReleased released;
                engine.cancel(batch);
            },
            nb::arg("batch"), "What has not been begun ends with ECANCELED.")
        .def("close", &close_engine, "Wait for what has been begun. Idempotent; in a forked child it does nothing.");
    module.attr("FileEngine").attr("BATCH_OPERATIONS_MAX") = io::batch_operations_max;
    module.attr("FileEngine").attr("OPERATIONS_MAX") = io::operations_max;
    module.attr("FileEngine").attr("ALIGN_BYTES") = io::align_bytes;
    module.attr("FileEngine").attr("WHY_FILE_END") = static_cast<std::int64_t>(io::Why::file_end);
    module.attr("FileEngine").attr("WHY_ENGINE") = static_cast<std::int64_t>(io::Why::mover);
    nb::class_<io::Batch>(module, "FileEngineBatch", "Operations that were submitted together. Any thread.")
        .def("__len__", &io::Batch::size)
        .def("wait", &wait, nb::arg("count"), nb::arg("until_s"),
             "How many have ended, once `count` have or the monotonic clock shows `until_s`; no GIL meanwhile.")
        .def(
            "ended",
            [](const io::Batch& batch) {
                check_not_inherited(batch.is_inherited());
                const std::vector<std::int64_t> numbers = batch.ended();
                return bytes_of(std::span<const std::int64_t>(numbers));
            },
            "Numbers of those that have ended, in that order (int64).")
        .def(
            "failures",
            [](const io::Batch& batch) {
                check_not_inherited(batch.is_inherited());
                const std::vector<io::Failure> rows = batch.failures();
                return bytes_of(std::span<const io::Failure>(rows));
            },
            "(operation, error number, file, offset, why) of those that failed (int64); why: `FileEngine.WHY_...`.")
        .def_prop_ro(
            "descriptor",
            [](io::Batch& batch) {
                check_not_inherited(batch.is_inherited());
                try {
                    return batch.descriptor();
                } catch (const std::system_error& error) {
                    raise_os_error(error);
                }
            },
            "Readable once all have ended.");
}

}  // namespace

void bind_io(nb::module_& module) {
    nb::register_exception_translator(&translate);
    bind_engine(module);
    module.def(
        "file_engines",
        [](unsigned depth) {
            std::vector<std::pair<std::string, std::string>> engines;
            for (const PathOffer& offer : io::engine_offers(depth)) {
                engines.emplace_back(offer.name, offer.missing);
            }
            return engines;
        },
        nb::arg("depth"), "(name, what is missing here for it) of each engine, from best to worst.");
    module.def(
        "choose_file_engine",
        [](unsigned depth, const std::optional<std::string>& forced) {
            const PathChoice choice = io::choose_engine(
                depth, forced ? std::optional<std::string_view>(*forced) : std::optional<std::string_view>());
            return std::pair(choice.name, choice.why_not_better);
        },
        nb::arg("depth"), nb::arg("forced").none() = nb::none(),
        nb::sig("def choose_file_engine(depth: int, forced: str | None = None) -> tuple[str, str]"),
        "(name, why not a better one). Without `forced` the environment variable KVSTORE_IO can force one.\n\n"
        "Raises RuntimeError when it is unknown or cannot run here.");
}

}  // namespace kvstore::bindings
