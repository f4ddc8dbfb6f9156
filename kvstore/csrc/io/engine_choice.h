// Which mover an engine gets: io_uring where the kernel gives it, else threads, or what the environment names.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "../forced_path.h"
#include "mover.h"

namespace kvstore::io {

// "io_uring" and "threads", with what is missing for `depth` pieces at once.
std::vector<PathOffer> engine_offers(unsigned depth);

// Throws std::runtime_error when `forced` (or, without it, KVSTORE_IO) is unknown or cannot run here.
PathChoice choose_engine(unsigned depth, std::optional<std::string_view> forced);

// Of a name that `choose_engine` gave.
MakeMover mover_of(std::string_view name);

}  // namespace kvstore::io
