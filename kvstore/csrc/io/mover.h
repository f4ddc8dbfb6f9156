// What begins pieces and says how they ended: io_uring, or threads.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "operation.h"

namespace kvstore::io {

// Where a mover gets its pieces. Any thread.
class PieceSource {
  public:
    virtual ~PieceSource() = default;
    // The next piece that may begin; nothing when none may. Whoever asks must report its end.
    virtual std::optional<Piece> next() = 0;
    // A piece that `next` gave has ended, with what the system call returned: bytes, or an error number below zero. Another one
    // may begin then, so a mover asks `next` again.
    virtual void ended(Piece piece, std::int64_t result) = 0;
    // As `ended`, of a piece that nobody will move because the mover itself has failed, with an error number above zero.
    virtual void refused(Piece piece, int error) = 0;
};

class Mover {
  public:
    virtual ~Mover() = default;
    // Up to so many more pieces may be had from `next`. Any thread; throws nothing.
    virtual void wake(std::size_t pieces) = 0;
    // Nothing is under way any more, and nothing more comes: end the threads. Idempotent; a wake may come after it.
    virtual void stop() = 0;
};

// A mover of at most `depth` pieces at once. Throws std::system_error when the system does not give what it needs.
using MakeMover = std::function<std::unique_ptr<Mover>(PieceSource& source, unsigned depth)>;

}  // namespace kvstore::io
