// Choosing among the implementations of one job: the best that the CPU can run, or the one that the environment names.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace kvstore {

struct PathOffer {
    std::string name;
    std::string missing;  // what the CPU lacks for it; empty when it can run
};

struct PathChoice {
    std::string name;
    std::string why_not_better;  // empty for the best there is
};

// The first offer that can run, or the forced one. `offers` go from best to worst, and the last can always run.
// Throws std::runtime_error when `forced` is unknown or cannot run; `variable` and `job` name it in the message.
PathChoice choose_path(std::span<const PathOffer> offers, std::string_view variable, std::string_view job,
                       std::optional<std::string_view> forced);

// The value of an environment variable; nothing when it is unset or empty.
std::optional<std::string_view> forced_by(const char* variable);

}  // namespace kvstore
