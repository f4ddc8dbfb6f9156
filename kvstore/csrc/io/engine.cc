#include "engine.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../arena/process_file.h"

namespace kvstore::io {
namespace {

// Tries of one piece in a row that move nothing: interrupted, no resources, nothing written.
constexpr unsigned fruitless_max = 1000;

bool ends_before(int descriptor, std::uint64_t end) {
    struct stat status {};
    return ::fstat(descriptor, &status) != 0 || static_cast<std::uint64_t>(status.st_size) < end;
}

}  // namespace

Engine::Engine(Private, LineRules rules) : forks_(fork_count()), rules_(rules), line_(rules) {}

std::shared_ptr<Engine> Engine::make(const MakeMover& make_mover, LineRules rules) {
    std::shared_ptr<Engine> engine(new Engine(Private{}, rules), [](Engine* held) {
        if (!held->is_inherited()) {
            delete held;
        }
    });
    engine->mover_ = make_mover(*engine, rules.depth + rules.urgent_depth);
    return engine;
}

Engine::~Engine() { close(); }

bool Engine::is_inherited() const { return fork_count() != forks_; }

void Engine::check_open() const {
    if (is_closed_) {
        throw ClosedError("the files are closed");
    }
}

std::uint64_t Engine::add_file(int descriptor) {
    const std::lock_guard lock(mutex_);
    check_open();
    files_.emplace(next_file_, File{descriptor});
    return next_file_++;
}

void Engine::remove_file(std::uint64_t file) {
    const std::lock_guard lock(mutex_);
    const auto found = files_.find(file);
    if (found == files_.end()) {
        throw std::invalid_argument("no open file has the number " + std::to_string(file));
    }
    if (found->second.operations != 0) {
        throw std::invalid_argument(std::to_string(found->second.operations) + " operations of file " +
                                    std::to_string(file) + " have not ended");
    }
    files_.erase(found);
}

Task Engine::task_of(const Row& row, std::size_t number) const {
    const auto refuse = [number](const std::string& why) {
        throw std::invalid_argument("operation " + std::to_string(number) + ": " + why);
    };
    if (row.kind > static_cast<std::uint64_t>(Kind::sync)) {
        refuse(std::to_string(row.kind) + " is no operation");
    }
    const auto kind = static_cast<Kind>(row.kind);
    const auto found = files_.find(row.file);
    if (found == files_.end()) {
        refuse("no open file has the number " + std::to_string(row.file));
    }
    const int descriptor = found->second.descriptor;
    if (kind == Kind::sync) {
        return {kind, row.file, descriptor, 0, nullptr, 1};
    }
    const auto check = [&refuse](const char* name, std::uint64_t value) {
        if (value % align_bytes != 0) {
            refuse(std::string(name) + " " + std::to_string(value) + " is not a multiple of " +
                   std::to_string(align_bytes));
        }
    };
    check("offset", row.offset);
    check("address", row.address);
    check("size", row.size_bytes);
    constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (row.size_bytes == 0 || row.address == 0) {
        refuse("its size or its address is 0");
    }
    if (row.offset > most || row.size_bytes > most - row.offset) {
        refuse("no file has " + std::to_string(row.offset) + " + " + std::to_string(row.size_bytes) + " bytes");
    }
    return {kind,       row.file,
            descriptor, row.offset,
            reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(row.address)), row.size_bytes};
}

std::shared_ptr<Batch> Engine::submit(std::span<const Row> rows, bool is_urgent) {
    if (rows.size() > batch_operations_max) {
        throw std::invalid_argument("a batch has at most " + std::to_string(batch_operations_max) +
                                    " operations, not " + std::to_string(rows.size()));
    }
    std::vector<Task> tasks;
    tasks.reserve(rows.size());
    std::shared_ptr<Batch> batch;
    std::shared_ptr<Mover> mover;
    std::size_t pieces = 0;
    {
        const std::lock_guard lock(mutex_);
        check_open();
        if (operations_ + rows.size() > operations_max) {
            throw std::invalid_argument(std::to_string(operations_) + " operations have not ended, " +
                                        std::to_string(operations_max) + " may; wait for some");
        }
        for (std::size_t number = 0; number < rows.size(); ++number) {
            tasks.push_back(task_of(rows[number], number));
            pieces += (tasks.back().length + rules_.piece_bytes - 1) / rules_.piece_bytes;
        }
        batch = Batch::make(std::move(tasks));
        line_.add(batch, is_urgent);
        for (const Task& task : batch->tasks()) {
            ++files_.find(task.file)->second.operations;
        }
        operations_ += rows.size();
        mover = mover_;
    }
    if (pieces != 0) {
        mover->wake(std::min<std::size_t>(pieces, rules_.depth + rules_.urgent_depth));
    }
    return batch;
}

void Engine::cancel(Batch& batch) {
    const std::lock_guard lock(mutex_);
    drop(&batch);
}

void Engine::drop(const Batch* batch) noexcept {
    line_.drop(batch, [this](Batch& dropped, std::uint32_t number) {
        Task& task = dropped.tasks()[number];
        if (task.error == 0) {
            task.error = ECANCELED;
        }
        finish_if_over(dropped, number);
    });
}

void Engine::close() {
    const std::lock_guard closing(closing_);
    {
        std::unique_lock lock(mutex_);
        is_closed_ = true;
        drop(nullptr);
        all_ended_.wait(lock, [this] { return operations_ == 0; });
        files_.clear();
    }
    if (mover_ != nullptr) {
        mover_->stop();
        // A submit that came before may yet wake it, and keeps it until then.
        const std::lock_guard lock(mutex_);
        mover_.reset();
    }
}

std::optional<Piece> Engine::next() {
    const std::lock_guard lock(mutex_);
    return line_.take();
}

std::optional<Piece> Engine::rest_of(Piece piece, std::int64_t result, Failure& failure) {
    failure.offset = static_cast<std::int64_t>(piece.offset);
    if (result == -EINTR || result == -EAGAIN) {
        failure.error = -result;
        ++piece.fruitless;
        return piece.fruitless < fruitless_max ? std::optional<Piece>(std::move(piece)) : std::nullopt;
    }
    if (result < 0) {
        failure.error = -result;
        return std::nullopt;
    }
    if (piece.kind == Kind::sync || static_cast<std::uint64_t>(result) >= piece.size_bytes) {
        return std::nullopt;
    }
    const auto moved = static_cast<std::uint64_t>(result);
    if (piece.kind == Kind::read &&
        (moved == 0 || (moved % align_bytes != 0 && ends_before(piece.descriptor, piece.offset + piece.size_bytes)))) {
        failure.error = EIO;
        failure.why = static_cast<std::int64_t>(Why::file_end);
        return std::nullopt;
    }
    // Direct I/O goes on at an aligned place only.
    const std::uint64_t kept = moved - moved % align_bytes;
    piece.offset += kept;
    piece.address += kept;
    piece.size_bytes -= kept;
    piece.fruitless = kept == 0 ? piece.fruitless + 1 : 0;
    if (piece.fruitless >= fruitless_max) {
        failure.error = EIO;
        return std::nullopt;
    }
    return piece;
}

void Engine::ended(Piece piece, std::int64_t result) {
    Failure failure{};
    std::optional<Piece> rest = rest_of(piece, result, failure);
    const std::lock_guard lock(mutex_);
    if (rest) {
        line_.again(*std::move(rest));
    } else {
        end(piece, failure);
    }
}

void Engine::refused(Piece piece, int error) {
    Failure failure{};
    failure.error = error;
    failure.offset = static_cast<std::int64_t>(piece.offset);
    failure.why = static_cast<std::int64_t>(Why::mover);
    const std::lock_guard lock(mutex_);
    end(piece, failure);
}

void Engine::end(const Piece& piece, const Failure& failure) {
    line_.give_back(piece.is_urgent);
    Task& task = piece.batch->tasks()[piece.task];
    --task.in_flight;
    if (failure.error != 0) {
        task.is_stopped = true;
        if (task.error == 0 || task.error == ECANCELED) {
            task.error = static_cast<int>(failure.error);
            task.failed_at = static_cast<std::uint64_t>(failure.offset);
            task.why = static_cast<Why>(failure.why);
        }
    }
    finish_if_over(*piece.batch, piece.task);
}

void Engine::finish_if_over(Batch& batch, std::uint32_t number) {
    Task& task = batch.tasks()[number];
    if (task.is_over || task.in_flight != 0 || (task.begun < task.length && !task.is_stopped)) {
        return;
    }
    task.is_over = true;
    --files_.find(task.file)->second.operations;
    if (--operations_ == 0) {
        all_ended_.notify_all();
    }
    batch.end(number);
}

}  // namespace kvstore::io
