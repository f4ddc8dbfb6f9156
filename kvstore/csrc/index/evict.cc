// Ranking, choosing and removing: what goes when something goes, and what stays as a ghost.
#include <algorithm>
#include <array>

#include "index.h"

namespace kvstore::index {

// Ranks

std::uint64_t Index::bytes_of(NodeId id, bool is_state) const {
    std::uint64_t bytes = 0;
    for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
        bytes += is_state_group_[records_[at].group] == is_state ? records_[at].slot_bytes : 0;
    }
    return bytes;
}

std::uint32_t Index::count_of(NodeId id, bool is_state) const {
    std::uint32_t count = 0;
    for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
        count += is_state_group_[records_[at].group] == is_state;
    }
    return count;
}

void Index::log(PolicyEvent::Kind kind, NodeId id, bool is_state) {
    events_.push_back({kind, is_state, nodes_[id].end_tokens, handle_of(id, is_state), bytes_of(id, is_state),
                       nodes_.key(id)});
}

void Index::rank(NodeId id, bool is_state) {
    order_.append(nodes_, handle_of(id, is_state));
    if (keeps_salt_orders_) {
        owner(id).order.append(salt_links_, handle_of(id, is_state));
    }
}

void Index::unrank(NodeId id, bool is_state) {
    if (!nodes_.has(id, is_ranked << static_cast<unsigned>(is_state))) {
        return;
    }
    nodes_.clear(id, (is_ranked | is_pushed) << static_cast<unsigned>(is_state));
    if (keeps_order_) {
        order_.remove(nodes_, handle_of(id, is_state));
        if (keeps_salt_orders_) {
            owner(id).order.remove(salt_links_, handle_of(id, is_state));
        }
    } else {
        log(PolicyEvent::remove, id, is_state);
    }
}

void Index::refresh(NodeId id, bool is_state) {
    unrank(id, is_state);
    if (!nodes_.has(id, is_state ? has_states : has_attention)) {
        return;
    }
    nodes_.set(id, is_ranked << static_cast<unsigned>(is_state));
    if (keeps_order_) {
        rank(id, is_state);
    } else {
        log(PolicyEvent::insert, id, is_state);
    }
}

void Index::access(NodeId id, bool is_state) {
    if (!nodes_.has(id, is_ranked << static_cast<unsigned>(is_state))) {
        return;
    }
    if (keeps_order_) {
        order_.remove(nodes_, handle_of(id, is_state));
        if (keeps_salt_orders_) {
            owner(id).order.remove(salt_links_, handle_of(id, is_state));
        }
        rank(id, is_state);
    } else {
        nodes_.clear(id, is_pushed << static_cast<unsigned>(is_state));
        log(PolicyEvent::access, id, is_state);
    }
}

// A hit used these nodes, root first: the last one's states, and the attention of all, an ancestor after what is below.
void Index::touch(std::span<const NodeId> nodes) {
    if (nodes.empty()) {
        return;
    }
    access(nodes.back(), true);
    for (std::size_t number = nodes.size(); number-- > 0;) {
        access(nodes[number], false);
    }
}

// What goes

bool Index::is_held(NodeId id, bool is_state) const {
    return (is_state ? nodes_[id].state_holds : nodes_[id].attention_holds) != 0;
}

// Everything that goes with a node's attention or its states, children first, but for what was chosen before.
// False if something of it is held.
bool Index::closure(NodeId id, bool is_state, std::vector<Handle>& found) const {
    if (is_held(id, is_state)) {
        return false;  // who holds something below a node holds the node too, so most searches end here
    }
    if (is_state) {
        found.push_back(handle_of(id, true));
        return true;
    }
    scratch_.clear();
    nodes_.below(id, scratch_, [&](NodeId child) { return nodes_.has(child, is_chosen); });
    scratch_.push_back(id);
    for (const NodeId member : scratch_) {
        if (is_held(member, true) || is_held(member, false)) {
            return false;
        }
        if (nodes_.has(member, has_states)) {
            found.push_back(handle_of(member, true));
        }
        if (nodes_.has(member, has_attention)) {
            found.push_back(handle_of(member, false));
        }
    }
    return true;
}

std::uint64_t Index::choose(std::uint64_t target_bytes) {
    if (!is_choosing_) {
        is_choosing_ = true;
        cursor_ = order_.oldest();
    }
    std::vector<Handle> found;
    while (chosen_bytes_ < target_bytes) {
        Handle handle = none;
        if (keeps_order_) {
            handle = cursor_;
        } else if (next_pushed_ < pushed_.size()) {
            handle = pushed_[next_pushed_++];
        }
        if (handle == none) {
            break;
        }
        const NodeId id = node_of(handle);
        const unsigned kind = kind_of(handle);
        if (keeps_order_) {
            cursor_ = order_.later(nodes_, handle);
        } else {
            if (!nodes_.has(id, is_pushed << kind)) {
                continue;  // gone, or used since it was named
            }
            nodes_.clear(id, is_pushed << kind);
        }
        choose_one(handle, found);
    }
    return chosen_bytes_;
}

// Choose an evictable with all that goes with it, unless it was chosen or something of it is held.
// `found` is memory to work in.
bool Index::choose_one(Handle handle, std::vector<Handle>& found) {
    if (nodes_.has(node_of(handle), is_chosen << kind_of(handle))) {
        return false;
    }
    found.clear();
    if (!closure(node_of(handle), kind_of(handle) != 0, found)) {
        return false;
    }
    for (const Handle member : found) {
        const NodeId id = node_of(member);
        const bool is_state = kind_of(member) != 0;
        if (nodes_.has(id, is_chosen << kind_of(member))) {
            continue;
        }
        chosen_.push_back(member);
        nodes_.set(id, is_chosen << kind_of(member));
        const std::uint64_t bytes = bytes_of(id, is_state) + count_of(id, is_state) * record_bytes;
        const bool keeps_other = nodes_.has(id, is_state ? has_attention : has_states) &&
                                 !nodes_.has(id, is_chosen << (is_state ? 0U : 1U));
        chosen_bytes_ += bytes;
        chosen_share_ += bytes + (keeps_other || nodes_[id].reserved != 0 ? 0 : node_share());
    }
    chosen_ends_.push_back(chosen_.size());
    return true;
}

std::uint64_t Index::choose_in(const std::string& salt, std::uint64_t target_bytes) {
    const auto number = salt_numbers_.find(salt);
    if (number == salt_numbers_.end()) {
        return 0;
    }
    const UseOrder& order = salts_[number->second].order;
    std::vector<Handle> found;
    for (Handle at = order.oldest(); at != none && chosen_share_ < target_bytes; at = order.later(salt_links_, at)) {
        choose_one(at, found);
    }
    return chosen_share_;
}

std::uint64_t Index::choose_in(const std::string& salt, std::span<const Handle> handles,
                               std::uint64_t target_bytes) {
    std::vector<Handle> found;
    for (std::size_t at = 0; at < handles.size() && chosen_share_ < target_bytes; ++at) {
        if (this->salt(node_of(handles[at])) == salt) {
            choose_one(handles[at], found);
        }
    }
    return chosen_share_;
}

void Index::push_victims(std::span<const Handle> handles) {
    // What was taken goes, or the list would grow as long as it is never used up.
    pushed_.erase(pushed_.begin(), pushed_.begin() + static_cast<std::ptrdiff_t>(next_pushed_));
    next_pushed_ = 0;
    for (const Handle handle : handles) {
        if (!nodes_.has(node_of(handle), is_pushed << kind_of(handle))) {
            pushed_.push_back(handle);
            nodes_.set(node_of(handle), is_pushed << kind_of(handle));
        }
    }
}

Handle Index::ranked_handle(const Digest& key, bool is_state) const {
    const NodeId id = find(key);
    return id != none && nodes_.has(id, is_ranked << static_cast<unsigned>(is_state)) ? handle_of(id, is_state) : none;
}

std::vector<Slot> Index::chosen_slots(std::size_t count) const {
    std::vector<Slot> slots;
    for (const Handle handle : std::span(chosen_).first(count == 0 ? 0 : chosen_ends_[count - 1])) {
        for (RecordId at = nodes_[node_of(handle)].first_record; at != none; at = records_[at].next) {
            if (is_state_group_[records_[at].group] == (kind_of(handle) != 0)) {
                slots.push_back(records_[at].slot());
            }
        }
    }
    return slots;
}

void Index::trim_choice(std::size_t count) {
    const std::size_t kept = count == 0 ? 0 : chosen_ends_[count - 1];
    for (const Handle handle : std::span(chosen_).subspan(kept)) {
        nodes_.clear(node_of(handle), is_chosen << kind_of(handle));
    }
    chosen_.resize(kept);
    chosen_ends_.resize(count);
}

void Index::drop_choice() {
    for (const Handle handle : chosen_) {
        nodes_.clear(node_of(handle), is_chosen << kind_of(handle));
    }
    chosen_.clear();
    chosen_ends_.clear();
    chosen_bytes_ = 0;
    chosen_share_ = 0;
    is_choosing_ = false;
}

std::vector<Slot> Index::evict_chosen() {
    std::vector<Slot> freed;
    const std::vector<Handle> victims = chosen_;
    reserve_removal(victims, freed);
    drop_choice();
    for (const Handle handle : victims) {
        remove(node_of(handle), kind_of(handle) != 0, freed);
    }
    return freed;
}

std::vector<Slot> Index::evict(NodeId id, bool states_only) {
    std::vector<Handle> found;
    std::vector<Slot> freed;
    if (closure(id, states_only, found)) {
        reserve_removal(found, freed);
        for (const Handle handle : found) {
            remove(node_of(handle), kind_of(handle) != 0, freed);
        }
    }
    return freed;
}

bool Index::has_slot(NodeId id, bool is_state, const Slot& slot) const {
    for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
        if (is_state_group_[records_[at].group] == is_state && records_[at].slot() == slot) {
            return true;
        }
    }
    return false;
}

// A node's attention and states, and those of all that hangs on it, children first.
void Index::everything_below(NodeId id, std::vector<Handle>& handles) const {
    std::vector<NodeId> members;
    nodes_.below(id, members, [](NodeId) { return false; });
    members.push_back(id);
    for (const NodeId member : members) {
        handles.insert(handles.end(), {handle_of(member, true), handle_of(member, false)});
    }
}

std::vector<Slot> Index::condemn(NodeId id, bool is_state) {
    std::vector<Slot> freed;
    std::vector<Handle> handles;
    if (is_state) {
        handles.push_back(handle_of(id, true));
    } else {
        everything_below(id, handles);
    }
    reserve_removal(handles, freed);
    for (const Handle handle : handles) {
        remove(node_of(handle), kind_of(handle) != 0, freed);
    }
    return freed;
}

std::vector<Slot> Index::condemn_all(SlotRange range) {
    std::vector<Handle> found;
    nodes_.each([&](NodeId id) {
        bool is_lost[2] = {false, false};
        for (RecordId at = nodes_[id].first_record; at != none; at = records_[at].next) {
            is_lost[is_state_group_[records_[at].group] ? 1 : 0] |= range.has(records_[at].slot());
        }
        for (const bool is_state : {true, false}) {
            if (is_lost[is_state ? 1 : 0]) {
                found.push_back(handle_of(id, is_state));
            }
        }
    });
    std::vector<Handle> handles;
    std::vector<bool> is_going(2 * std::size_t{nodes_.id_count()});
    const auto add = [&](Handle handle) {
        if (!is_going[handle]) {
            is_going[handle] = true;
            handles.push_back(handle);
        }
    };
    std::vector<NodeId> members;
    for (const Handle handle : found) {
        if (kind_of(handle) != 0) {
            add(handle);
        } else if (!is_going[handle]) {
            members.clear();
            nodes_.below(node_of(handle), members, [&](NodeId child) { return is_going[handle_of(child, false)]; });
            members.push_back(node_of(handle));
            for (const NodeId member : members) {
                add(handle_of(member, true));
                add(handle_of(member, false));
            }
        }
    }
    std::vector<Slot> freed;
    reserve_removal(handles, freed);
    for (const Handle handle : handles) {
        remove(node_of(handle), kind_of(handle) != 0, freed);
    }
    return freed;
}

std::vector<Slot> Index::remove_unchecked(NodeId id, bool is_state) {
    std::vector<Slot> freed;
    reserve_removal(std::array{handle_of(id, is_state)}, freed);
    remove(id, is_state, freed);
    return freed;
}

// Afterwards `remove` of these throws nothing: half a removal would leave slots that nobody frees.
void Index::reserve_removal(std::span<const Handle> handles, std::vector<Slot>& freed) {
    std::size_t records = 0;
    for (const Handle handle : handles) {
        if (!nodes_.has(node_of(handle), is_detached)) {
            records += count_of(node_of(handle), kind_of(handle) != 0);
        }
    }
    freed.reserve(freed.size() + records);
    lost_handovers_.reserve(lost_handovers_.size() + handles.size());
    if (is_watched_) {
        changes_.reserve(changes_.size() + handles.size());
    }
    if (!keeps_order_) {
        events_.reserve(events_.size() + handles.size());
    }
}

// Below attention nothing may be left: whoever removes it has removed that before.
void Index::remove(NodeId id, bool is_state, std::vector<Slot>& freed) {
    if (nodes_.has(id, is_detached) || nodes_.parent(id) == id) {
        return;  // forgotten with what went before
    }
    std::uint64_t size_bytes = 0;
    for (RecordId* link = &nodes_[id].first_record; *link != none;) {
        const RecordId at = *link;
        const Record& record = records_[at];
        if (is_state_group_[record.group] != is_state) {
            link = &records_[at].next;
            continue;
        }
        *link = record.next;
        freed.push_back(record.slot());
        size_bytes += record.slot_bytes;
        committed_bytes_ -= record.slot_bytes;
        ++lost_records_;
        owner(id).bytes -= record.slot_bytes;
        --owner(id).records;
        grids_.drop(record.grid);
        records_.remove(at);
    }
    if (is_watched_ && nodes_.has(id, is_state ? has_states : has_attention)) {
        note(id, is_state, size_bytes, false);
    }
    nodes_.clear(id, is_state ? has_states : has_attention);
    unrank(id, is_state);
    lives_.clear(nodes_, handle_of(id, is_state));
    if (!holds_records(id)) {
        nodes_.clear(id, ends_prompt | has_end);
    }
    if (nodes_.has(id, has_handover)) {
        nodes_.clear(id, has_handover);
        lost_handovers_.push_back(id);
    }
    retire(id);
}

// Ghosts

// Make a node without records a ghost; forget old ghosts beyond the limit.
void Index::retire(NodeId id) {
    if (holds_records(id) || nodes_[id].reserved != 0 || nodes_.has(id, is_detached) || nodes_.parent(id) == id) {
        return;
    }
    if (nodes_.has(id, is_tail)) {
        forget(id);
        return;
    }
    if (!nodes_.has(id, is_ghost)) {
        nodes_.set(id, is_ghost);
        ++ghosts_;
        --owner(id).nodes;
    }
    if (nodes_.is_leaf(id)) {
        become_idle(id);
    }
    if (ghosts_ > ghosts_max_) {
        drop_ghosts(ghosts_ - ghosts_max_);
    }
}

std::uint32_t Index::drop_ghosts(std::uint32_t count) {
    std::uint32_t dropped = 0;
    for (; dropped < count && idle_.oldest() != none; ++dropped) {
        forget(node_of(idle_.oldest()));
    }
    return dropped;
}

void Index::become_idle(NodeId id) {
    if (!nodes_.has(id, is_idle)) {
        nodes_.set(id, is_idle);
        idle_.append(nodes_, handle_of(id, false));
    }
}

void Index::no_ghost(NodeId id) {
    if (nodes_.has(id, is_idle)) {
        idle_.remove(nodes_, handle_of(id, false));
    }
    if (nodes_.has(id, is_ghost)) {
        --ghosts_;
        ++owner(id).nodes;
    }
    nodes_.clear(id, is_ghost | is_idle);
}

void Index::forget(NodeId id) {
    no_ghost(id);
    --owner(id).nodes;
    const NodeId parent = nodes_.parent(id);
    nodes_.detach(id);
    recycle_if_unused(id);
    if (nodes_.is_leaf(parent)) {
        if (nodes_.has(parent, is_root)) {
            drop_salt_root(nodes_[parent].root);
            nodes_.detach(parent);
            nodes_.recycle(parent);
        } else if (nodes_.has(parent, is_ghost)) {
            become_idle(parent);
        }
    }
}

}  // namespace kvstore::index
