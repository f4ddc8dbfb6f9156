#include "index.h"

namespace kvstore::index {

Index::Index(std::vector<bool> is_state_group, std::uint32_t ghosts_max, bool keeps_order, std::uint64_t seed)
    : is_state_group_(std::move(is_state_group)), ghosts_max_(ghosts_max), keeps_order_(keeps_order), nodes_(seed), grids_(seed) {}

// What the index holds, by the size of each part. Freed places are used again before there are new ones.
std::size_t Index::memory_bytes() const {
    const std::size_t nodes = std::size_t{nodes_.prefix_count()} + nodes_.root_count() + nodes_.detached_count();
    return nodes * node_share() + records_.size() * record_bytes + nodes_.tail_ids_bytes() +
           grids_.size() * Grids::grid_bytes + salt_name_bytes_ + lives_.memory_bytes();
}

std::size_t Index::allocated_bytes() const {
    return nodes_.allocated_bytes() + records_.allocated_bytes() + grids_.size() * Grids::grid_bytes +
           salt_name_bytes_ + pushed_.capacity() * sizeof(Handle) + salt_links_.allocated_bytes() +
           lives_.allocated_bytes();
}

std::uint32_t Index::use_salt(const std::string& name) {
    const auto found = salt_numbers_.find(name);
    if (found != salt_numbers_.end()) {
        ++salts_[found->second].roots;
        return found->second;
    }
    reserve_one(salts_);
    free_salts_.reserve(salts_.capacity());
    const auto number = free_salts_.empty() ? static_cast<std::uint32_t>(salts_.size()) : free_salts_.back();
    std::string kept = name;
    salt_numbers_.emplace(name, number);  // the last that may throw
    if (free_salts_.empty()) {
        salts_.emplace_back();
    } else {
        free_salts_.pop_back();
    }
    salts_[number] = Salt{.name = std::move(kept), .roots = 1};
    salt_name_bytes_ += 2 * name.size();
    return number;
}

void Index::drop_salt_root(std::uint32_t number) {
    Salt& salt = salts_[number];
    if (--salt.roots == 0) {
        salt_numbers_.erase(salt.name);
        salt_name_bytes_ -= 2 * salt.name.size();
        salt.name = {};
        free_salts_.push_back(number);
    }
}

std::uint64_t Index::share_of(const std::string& salt) const {
    const auto found = salt_numbers_.find(salt);
    if (found == salt_numbers_.end()) {
        return 0;
    }
    const Salt& owner = salts_[found->second];
    return owner.bytes + owner.records * std::uint64_t{record_bytes} + owner.nodes * std::uint64_t{node_share()};
}

std::vector<std::pair<std::string, std::uint64_t>> Index::bytes_by_salt() const {
    std::vector<std::pair<std::string, std::uint64_t>> bytes;
    for (const Salt& salt : salts_) {
        if (salt.bytes != 0) {
            bytes.emplace_back(salt.name, salt.bytes);
        }
    }
    return bytes;
}

}  // namespace kvstore::index
