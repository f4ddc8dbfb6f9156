// Which piece is begun next.
//
// Urgent operations go before others, reads before writes and syncs, each in the order in which they were submitted. Those that wait
// for better ones get one turn in `floor_share`, so nothing starves. Others may have `depth` pieces under way at once, urgent ones
// `urgent_depth` more, so that an urgent read begins at once behind a queue that is full.
//
// No lock, no I/O: its engine calls it under its own mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "batch.h"
#include "operation.h"

namespace kvstore::io {

struct LineRules {
    unsigned depth = 32;
    unsigned urgent_depth = 8;
    unsigned floor_share = 16;
    std::uint64_t piece_bytes = 1U << 20;
};

class Line {
  public:
    explicit Line(LineRules rules);

    // Nothing is changed when this throws; the rest throws nothing.
    void add(const std::shared_ptr<Batch>& batch, bool is_urgent);
    // The next piece; it counts as under way until `give_back`. Nothing when nothing waits or may begin.
    std::optional<Piece> take();
    // A piece that was taken has ended; `again` puts it before all others.
    void give_back(bool was_urgent);
    void again(Piece piece);
    // What has not been begun of a batch, or of every batch for null, is stopped and leaves the line; `stopped` is told each
    // batch and the number of the task in it.
    template <typename Stopped>
    void drop(const Batch* batch, Stopped stopped) {
        const auto is_dropped = [batch](const Entry& entry) { return batch == nullptr || entry.batch.get() == batch; };
        for (Lane& lane : lanes_) {
            for (Entry& entry : lane) {
                for (std::size_t at = is_dropped(entry) ? entry.next : entry.tasks.size(); at < entry.tasks.size(); ++at) {
                    entry.batch->tasks()[entry.tasks[at]].is_stopped = true;
                    stopped(*entry.batch, entry.tasks[at]);
                }
            }
            std::erase_if(lane, is_dropped);
        }
    }

    std::size_t under_way() const { return urgent_under_way_ + others_under_way_; }

  private:
    struct Entry {
        std::shared_ptr<Batch> batch;
        std::vector<std::uint32_t> tasks;
        std::size_t next = 0;
    };
    using Lane = std::deque<Entry>;
    enum Which : std::size_t { urgent = 0, reads = 1, writes = 2 };

    Lane* choose();
    std::optional<Piece> take_from(Lane& lane);
    static void skip_stopped(Lane& lane);

    const LineRules rules_;
    Lane lanes_[3];
    std::vector<Piece> again_;  // with those under way never more than may be under way
    std::size_t urgent_under_way_ = 0;
    std::size_t others_under_way_ = 0;
    unsigned urgent_run_ = 0;  // urgent pieces in a row while others waited
    unsigned read_run_ = 0;    // reads in a row while writes waited
};

}  // namespace kvstore::io
