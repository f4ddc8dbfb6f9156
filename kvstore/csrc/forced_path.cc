#include "forced_path.h"

#include <cstdlib>
#include <stdexcept>

namespace kvstore {
namespace {

std::string quoted_names(std::span<const PathOffer> offers, std::string_view except) {
    std::string names;
    for (const PathOffer& offer : offers) {
        if (offer.missing.empty() && offer.name != except) {
            names += (names.empty() ? "'" : ", '") + offer.name + "'";
        }
    }
    return names;
}

}  // namespace

PathChoice choose_path(std::span<const PathOffer> offers, std::string_view variable, std::string_view job,
                       std::optional<std::string_view> forced) {
    if (!forced) {
        std::string why;
        for (const PathOffer& offer : offers) {
            if (offer.missing.empty()) {
                return {offer.name, why};
            }
            why += (why.empty() ? "" : "; ") + offer.missing;
        }
        throw std::runtime_error("no " + std::string(job) + " path can run on this CPU: " + why);
    }
    const std::string setting = std::string(variable) + "=" + std::string(*forced);
    for (const PathOffer& offer : offers) {
        if (offer.name != *forced) {
            continue;
        }
        if (!offer.missing.empty()) {
            throw std::runtime_error(setting + " cannot be used: " + offer.missing + "; use one of " +
                                     quoted_names(offers, offer.name) + ", or unset it to let kvstore choose");
        }
        return {offer.name, &offer == offers.data() ? "" : setting + " forces it"};
    }
    throw std::runtime_error(setting + " names no " + std::string(job) + " path; use one of " +
                             quoted_names(offers, "") + ", or unset it");
}

std::optional<std::string_view> forced_by(const char* variable) {
    const char* value = std::getenv(variable);
    return value != nullptr && *value != '\0' ? std::optional<std::string_view>(value) : std::nullopt;
}

}  // namespace kvstore
