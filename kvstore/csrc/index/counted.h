// Writes whose records are counted and lie nowhere, each in one step: for whoever works out what a tier would keep.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "index.h"

namespace kvstore::index {

struct CountedState {
    std::uint32_t blocks;  // of the path, that it is at the end of
    std::uint32_t size_bytes;
};

// A path's attention, and states at some of its lengths. Borrowed memory.
struct CountedWrite {
    Path path;  // whole blocks
    std::string salt;
    const Needs* needs;  // one group of each kind at most, of one span and one unit
    std::uint32_t block_bytes;
    std::span<const CountedState> states;  // ascending; passed over where the model has none
    double capacity_bytes;
    std::uint64_t records_max;
};

enum class CountedOutcome {
    written,     // or there already
    no_room,     // what could go is not enough
    too_many,    // records
    wrong_path,  // it contradicts what is here
};

struct Counted {
    CountedOutcome outcome = CountedOutcome::written;
    std::uint64_t written_bytes = 0;
    std::uint64_t evicted_bytes = 0;
};

// Enter what of it is not there, evicting what was used longest ago. With any other outcome nothing has changed; when
// memory runs out, something may have been evicted.
Counted write_counted(Index& index, const CountedWrite& write);

}  // namespace kvstore::index
