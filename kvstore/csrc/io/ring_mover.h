// io_uring, driven by one thread.
#pragma once

#include "mover.h"

namespace kvstore::io {

// Throws std::system_error when the kernel does not give a ring, or the system no thread.
std::unique_ptr<Mover> make_ring_mover(PieceSource& source, unsigned depth);

}  // namespace kvstore::io
