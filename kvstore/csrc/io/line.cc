#include "line.h"

#include <algorithm>
#include <utility>

namespace kvstore::io {

Line::Line(LineRules rules) : rules_(rules) { again_.reserve(std::size_t{rules.depth} + rules.urgent_depth); }

void Line::add(const std::shared_ptr<Batch>& batch, bool is_urgent) {
    Entry entries[3];
    const std::vector<Task>& tasks = batch->tasks();
    for (std::uint32_t number = 0; number < tasks.size(); ++number) {
        const Which lane = is_urgent ? urgent : tasks[number].kind == Kind::read ? reads : writes;
        entries[lane].tasks.push_back(number);
    }
    std::size_t lane = 0;
    try {
        for (; lane < 3; ++lane) {
            entries[lane].batch = batch;
            lanes_[lane].push_back(std::move(entries[lane]));
        }
    } catch (...) {
        while (lane-- > 0) {
            lanes_[lane].pop_back();
        }
        throw;
    }
    // An entry of no tasks would stay for as long as what stands before it.
    for (Lane& each : lanes_) {
        if (each.back().tasks.empty()) {
            each.pop_back();
        }
    }
}

Line::Lane* Line::choose() {
    for (Lane& lane : lanes_) {
        skip_stopped(lane);
    }
    const bool may_others = others_under_way_ < rules_.depth;
    const bool has_urgent = !lanes_[urgent].empty();
    const bool has_reads = may_others && !lanes_[reads].empty();
    const bool has_writes = may_others && !lanes_[writes].empty();
    // A run is counted while somebody waits for its end.
    if (has_urgent && !((has_reads || has_writes) && urgent_run_ + 1 >= rules_.floor_share)) {
        urgent_run_ += has_reads || has_writes ? 1 : 0;
        return &lanes_[urgent];
    }
    if (has_reads && !(has_writes && read_run_ + 1 >= rules_.floor_share)) {
        urgent_run_ = 0;
        read_run_ += has_writes ? 1 : 0;
        return &lanes_[reads];
    }
    if (has_writes) {
        urgent_run_ = 0;
        read_run_ = 0;
        return &lanes_[writes];
    }
    return nullptr;
}

void Line::skip_stopped(Lane& lane) {
    while (!lane.empty()) {
        Entry& entry = lane.front();
        const std::vector<Task>& tasks = entry.batch->tasks();
        while (entry.next < entry.tasks.size() && tasks[entry.tasks[entry.next]].is_stopped) {
            ++entry.next;
        }
        if (entry.next < entry.tasks.size()) {
            return;
        }
        lane.pop_front();
    }
}

std::optional<Piece> Line::take() {
    if (under_way() >= rules_.depth + rules_.urgent_depth) {
        return std::nullopt;
    }
    std::optional<Piece> piece;
    const auto first = std::find_if(again_.begin(), again_.end(), [this](const Piece& waiting) {
        return waiting.is_urgent || others_under_way_ < rules_.depth;
    });
    if (first != again_.end()) {
        piece = std::move(*first);
        again_.erase(first);
    } else if (Lane* lane = choose()) {
        piece = take_from(*lane);
    }
    if (piece) {
        ++(piece->is_urgent ? urgent_under_way_ : others_under_way_);
    }
    return piece;
}

std::optional<Piece> Line::take_from(Lane& lane) {
    Entry& entry = lane.front();
    const std::uint32_t number = entry.tasks[entry.next];
    Task& task = entry.batch->tasks()[number];
    const std::uint64_t size = std::min(task.length - task.begun, rules_.piece_bytes);
    Piece piece;
    piece.batch = entry.batch;
    piece.task = number;
    piece.kind = task.kind;
    piece.is_urgent = &lane == &lanes_[urgent];
    piece.descriptor = task.descriptor;
    if (task.kind != Kind::sync) {
        piece.offset = task.offset + task.begun;
        piece.address = task.address + task.begun;
        piece.size_bytes = size;
    }
    task.begun += size;
    ++task.in_flight;
    if (task.begun == task.length && ++entry.next == entry.tasks.size()) {
        lane.pop_front();
    }
    return piece;
}

void Line::give_back(bool was_urgent) { --(was_urgent ? urgent_under_way_ : others_under_way_); }

void Line::again(Piece piece) {
    give_back(piece.is_urgent);
    again_.push_back(std::move(piece));
}

}  // namespace kvstore::io
