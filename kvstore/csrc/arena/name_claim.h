// Who owns a name in a directory of shared memory.
#pragma once

#include <string>

#include "process_file.h"

namespace kvstore {

// Removes what a dead owner left at `path`; nothing is there afterwards, unless somebody is faster.
// Throws ArenaError when its owner lives, or when the file is none of ours.
void remove_remains(const std::string& path);

// A file without a name, locked by this process, in `directory`. It vanishes with the process unless it gets a name.
ProcessFile open_unnamed(const std::string& directory);

// Gives the file its name. It appears complete and locked, or not at all. Throws ArenaError as `remove_remains`.
void give_name(const ProcessFile& file, const std::string& path);

// Removes the name if it still leads to this file.
void remove_name(const ProcessFile& file, const std::string& path) noexcept;

}  // namespace kvstore
