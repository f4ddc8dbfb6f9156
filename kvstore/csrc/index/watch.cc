// What changed, for whoever watches: noted where records come and go, taken after each call.
#include "index.h"

namespace kvstore::index {

Change Index::change_of(NodeId id, bool is_state, std::uint64_t size_bytes, bool is_added) const {
    return {.is_added = is_added,
            .is_state = is_state,
            .end_tokens = nodes_[id].end_tokens,
            .salt = salt_of(id),
            .size_bytes = size_bytes,
            .key = nodes_.key(id),
            .parent = nodes_.key(nodes_.parent(id))};
}

// Room for it was made before anything was changed. The salt's number must not be given to another one before its name
// was looked at, so a change counts as one of its roots.
void Index::note(NodeId id, bool is_state, std::uint64_t size_bytes, bool is_added) {
    changes_.push_back(change_of(id, is_state, size_bytes, is_added));
    ++salts_[changes_.back().salt].roots;
}

void Index::watch(bool is_watched) {
    drop_changes();
    is_watched_ = is_watched;
}

void Index::drop_changes() {
    for (const Change& change : changes_) {
        drop_salt_root(change.salt);
    }
    changes_.clear();
}

std::vector<Change> Index::contents() const {
    std::vector<Change> found;
    nodes_.each([&](NodeId id) {
        for (const bool is_state : {false, true}) {
            if (nodes_.has(id, is_state ? has_states : has_attention)) {
                found.push_back(change_of(id, is_state, bytes_of(id, is_state), true));
            }
        }
    });
    return found;
}

}  // namespace kvstore::index
