// pread, pwrite and fdatasync, each in a thread of its own as long as it takes.
#pragma once

#include "mover.h"

namespace kvstore::io {

// Threads are started as they are needed, `depth` at most. Throws std::system_error when not even one can be started.
std::unique_ptr<Mover> make_thread_mover(PieceSource& source, unsigned depth);

}  // namespace kvstore::io
