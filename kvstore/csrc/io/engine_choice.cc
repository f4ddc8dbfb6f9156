#include "engine_choice.h"

#include "ring.h"
#include "ring_mover.h"
#include "thread_mover.h"

namespace kvstore::io {

std::vector<PathOffer> engine_offers(unsigned depth) {
    // One entry more, by which the thread of the ring is woken.
    return {{"io_uring", why_no_ring(depth + 1)}, {"threads", ""}};
}

PathChoice choose_engine(unsigned depth, std::optional<std::string_view> forced) {
    return choose_path(engine_offers(depth), "KVSTORE_IO", "file I/O", forced ? forced : forced_by("KVSTORE_IO"));
}

MakeMover mover_of(std::string_view name) {
    if (name == "io_uring") {
        return &make_ring_mover;
    }
    return &make_thread_mover;
}

}  // namespace kvstore::io
