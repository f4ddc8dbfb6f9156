// The prefix index: which records are there, for which prefix. Not thread-safe: the pool calls it under its lock.
//
// Invariants, asserted by `check`: a node's ancestors exist; attention is contiguous from the root, per shard unit
// and exactness class; whoever holds a node holds its ancestors; ghosts are bounded.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "chunked.h"
#include "grids.h"
#include "lives.h"
#include "needs.h"
#include "nodes.h"
#include "records.h"
#include "use_order.h"

namespace kvstore::index {

struct Query {
    Path path;
    std::span<const std::uint32_t> token_ids;
    std::uint32_t cap_tokens;
    const Needs* needs;
    const Grid* grid;                   // nullptr takes any
    std::uint32_t candidates_max;
    std::span<const NodeId> excluded;   // tails of the same ids that are not this prompt's
};

struct Candidate {
    std::uint32_t blocks;
    NodeId tail;  // or none
    std::uint32_t tokens;
};

struct Found {
    std::vector<Candidate> candidates;  // deepest first
    std::vector<Candidate> tails;       // whose ids the prompt continues: whether their keys are its own is open
    std::vector<std::uint32_t> branch_points;
    std::uint32_t attention_tokens = 0;
    std::uint32_t pending_tokens = 0;
    std::uint32_t evicted_state_tokens = 0;
    std::uint32_t evicted_attention_tokens = 0;
    std::uint32_t foreign_state_tokens = 0;
    bool is_other_grid = false;
    bool is_other_shard = false;
};

// A record of a path, as readers and writers see it.
struct Row {
    std::uint32_t node;
    std::uint16_t group;
    std::uint16_t span;
    Units units;
    Slot slot;
    Digest grid;
    std::uint64_t cost_us;
};

// A digest that the record at one place must carry.
struct PlaceGrid {
    std::uint32_t node;
    std::uint16_t group;
    std::uint16_t span;
    Digest digest;
    auto place() const { return std::tuple(node, group, span); }
};

// Nodes that a reader holds, and the records there.
struct Held {
    std::vector<NodeId> nodes;
    std::vector<Row> rows;  // by group, span, node, units
};

// A record that a writer provides.
struct Name {
    std::uint32_t node;
    std::uint16_t group;
    std::uint16_t span;
    Units units;
    Digest grid;
};

enum class PlanStatus { ok, wrong_path, gap };

// What one writer has reserved, and the nodes that it relies on.
struct WriteSet {
    PlanStatus status = PlanStatus::ok;
    std::uint32_t gap_node = 0;
    std::vector<Row> missing;  // to be reserved, in the order in which they were named
    std::vector<Row> held;     // there already
    std::uint32_t new_nodes = 0;  // without a new root
    bool is_new_root = false;
    std::vector<NodeId> nodes;
    std::vector<NodeId> basis_tail;
    std::vector<std::uint32_t> resume_nodes;
    std::vector<GridId> grids;  // in use from `enter` on, so that their memory is counted before there is a commit
};

// Nodes and records that somebody kept elsewhere, to be entered in one step. Borrowed memory.
struct KeptNode {
    const Digest* key;
    const Digest* parent;
    std::uint32_t end_tokens;
    std::uint32_t root;  // number among the roots
    std::span<const std::uint32_t> tail_ids;
};
struct KeptRoot {
    Digest key;
    std::string salt;
};

// Records that lie in a part of the tier, with their nodes and all nodes above.
struct Survey {
    std::vector<NodeId> nodes;  // parents before children
    std::vector<Row> rows;      // `node` counts `nodes`
};

// What is looked for by where it lies: slots whose index has this value under a mask.
struct SlotRange {
    std::uint64_t mask;
    std::uint64_t value;
    bool has(const Slot& slot) const { return (slot.index & mask) == value; }
};

// A change of what may be evicted, for a policy outside.
struct PolicyEvent {
    enum Kind : std::uint8_t { insert, access, remove } kind;
    bool is_state;
    std::uint32_t end_tokens;
    Handle handle;
    std::uint64_t size_bytes;
    Digest key;
};

// How long what a writer commits is wanted, and how many of its nodes, from the root, have been committed.
struct Life {
    Moment ends_at = lasting;
    std::uint32_t nodes = 0;
};

// What has ended by itself: a node's states, or its attention and all that hung on it.
struct Expired {
    Digest key;
    bool is_state;
};

// What a node has of one kind has appeared or grown, or is gone: for whoever watches the index from outside.
struct Change {
    bool is_added;
    bool is_state;
    std::uint32_t end_tokens;
    std::uint32_t salt;  // its number, which stays taken until the changes are dropped
    std::uint64_t size_bytes;
    Digest key;
    Digest parent;
};

class Index {
  public:
    // `keeps_order`: victims are what was used longest ago. Otherwise a policy outside is told of every change and
    // pushes its victims.
    Index(std::vector<bool> is_state_group, std::uint32_t ghosts_max, bool keeps_order, std::uint64_t seed);

    Index(const Index&) = delete;
    Index& operator=(const Index&) = delete;

    static constexpr std::size_t node_bytes = Nodes::node_bytes;
    static constexpr std::size_t record_bytes = Records::record_bytes;

    // Counters
    std::uint32_t node_count() const { return nodes_.prefix_count(); }
    std::uint32_t ghost_count() const { return ghosts_; }
    std::uint32_t record_count() const { return records_.size(); }
    std::uint64_t committed_bytes() const { return committed_bytes_; }
    // How many records have left, ever: while it stays, what was here is here.
    std::uint64_t lost_records() const { return lost_records_; }
    std::size_t memory_bytes() const;
    std::size_t allocated_bytes() const;
    std::vector<std::pair<std::string, std::uint64_t>> bytes_by_salt() const;
    // Committed records of a salt, and the index's memory for them and for their nodes; ghosts are nobody's.
    std::uint64_t share_of(const std::string& salt) const;
    // What one node counts for in it.
    std::size_t node_share() const { return node_bytes + (keeps_salt_orders_ ? sizeof(OrderLinks) : 0); }
    // Also keep the order of use of each salt by itself, so that `choose_in` need not look past others' records.
    // Only before there is anything, and without a policy outside.
    void keep_salt_orders() { keeps_salt_orders_ = keeps_order_; }

    // Nodes
    NodeId find(const Digest& key) const;
    const Nodes& nodes() const { return nodes_; }
    const std::string& salt(NodeId id) const { return salts_[salt_of(id)].name; }
    bool holds_records(NodeId id) const { return nodes_.has(id, has_attention | has_states); }
    void mark(NodeId id, Flag flag, bool is_set) { is_set ? nodes_.set(id, flag) : nodes_.clear(id, flag); }

    // Reading
    Found match(const Query& query) const;
    // Every record of a resume point; nothing if one is not there. `places` overrides `grid`.
    std::optional<Held> collect(const Path& path, const Needs& needs, const Grid* grid,
                                const std::vector<PlaceGrid>* places) const;
    void hold(const Held& held);
    // What was freed with a tail that came for a hand-over only.
    std::vector<Slot> release(const Held& held);
    bool is_there(const Path& path, const Name& name, bool is_lossy) const;
    // The path was used, as far as it is here.
    void touch_path(const Path& path);

    // Restoring, surveying
    // Enter what was kept, into an empty index: records of nodes that hang together, attention as far as it is contiguous
    // from the root, states where there is attention if the model has any. Of records of one name the last counts. `rows`
    // count `nodes`, and come in the order of their use, oldest first. Whether each record was taken.
    // When this throws, the index is of no more use.
    std::vector<bool> restore(std::uint32_t block_tokens, std::span<const KeptNode> nodes,
                              std::span<const KeptRoot> roots, std::span<const Row> rows);
    // `in_order`: in the order of use, which must be kept here.
    Survey survey(SlotRange range, bool in_order) const;
    // The record of this node lies elsewhere from now on. False if it has left the index.
    bool relocate(const Digest& key, const Slot& from, const Slot& to);

    // Writing
    WriteSet plan(const Path& path, std::span<const Name> names, bool is_lossy) const;
    // Make the nodes and rely on them. Nothing is changed when this throws.
    void enter(WriteSet& set, const Path& path, const std::string& salt, std::vector<NodeId> basis_tail,
               std::vector<std::uint32_t> resume_nodes);
    // After `enter`, when nothing could be reserved.
    void undo(WriteSet& set);
    // The records of `ready` appear; the numbers of those that another writer has committed, or that nothing leads to.
    std::vector<std::uint32_t> commit(const WriteSet& set, std::span<const std::uint64_t> ready,
                                      std::span<const std::uint64_t> costs_us, Residency residency, Life life = {});
    // The writer has ended; what it relied on stays until `let_go`.
    void leave(WriteSet& set);
    std::vector<Slot> let_go(WriteSet& set);

    // Evicting
    // What goes with a node's attention or states, or nothing if something of it is held.
    std::vector<Slot> evict(NodeId id, bool states_only);
    // Damaged: the node's states, or its attention with everything below, held or not.
    std::vector<Slot> condemn(NodeId id, bool is_state);
    // A part of the tier is lost.
    std::vector<Slot> condemn_all(SlotRange range);
    bool has_slot(NodeId id, bool is_state, const Slot& slot) const;
    std::uint32_t drop_ghosts(std::uint32_t count);

    // Choose victims until `target_bytes` would be freed, from the order of use or from what was pushed; the bytes so far.
    std::uint64_t choose(std::uint64_t target_bytes);
    // The same within one salt, before any `choose`: until its share would shrink by so much; by how much it would so
    // far. In the order of use, which `keep_salt_orders` has to have been asked for; or by the order of `handles`.
    std::uint64_t choose_in(const std::string& salt, std::uint64_t target_bytes);
    std::uint64_t choose_in(const std::string& salt, std::span<const Handle> handles, std::uint64_t target_bytes);
    void push_victims(std::span<const Handle> handles);
    std::size_t pushed_count() const { return pushed_.size() - next_pushed_; }
    // How many evictables were named so far for whom there is a choice, and what the first so many of them would free.
    std::size_t chosen_count() const { return chosen_ends_.size(); }
    std::vector<Slot> chosen_slots(std::size_t count) const;
    // Keep the first so many only.
    void trim_choice(std::size_t count);
    std::vector<Slot> evict_chosen();
    void drop_choice();
    Handle ranked_handle(const Digest& key, bool is_state) const;

    // Time to live
    // The deepest prefix of a path that is stored is wanted until a moment, and so are shorter resume points of it past
    // `after_tokens`; what is shared with others that are wanted for longer stays. The prefix's length, 0 without one.
    // With `meant_tokens` the prefix of this length is meant, which may be stored deeper elsewhere than it is here: then
    // what is wanted for itself here stays, and the rest of the path is wanted no longer than what needs it.
    std::uint32_t set_end(const Path& path, Moment at, std::uint32_t after_tokens, std::uint32_t meant_tokens = 0);
    // The length of the deepest prefix of a path that has records, 0 without one.
    std::uint32_t stored_tokens(const Path& path) const;
    // Forget what has ended, held or not; but not what a running writer goes on from: that is for when it has ended,
    // unless `even_written`.
    std::vector<Slot> expire(Moment now, bool even_written = false);
    // When there may be something to expire.
    Moment next_end() const { return lives_.next(); }
    std::size_t life_bytes() const { return lives_.memory_bytes(); }
    // When the attention and the states of each node end, and the prompts that end there; 0 for what is not there.
    std::vector<Moment> ends_of(std::span<const Digest> keys) const;
    // What is there of nodes, ancestors first, lives until these moments at least, three of each as `ends_of` has them.
    void prolong(std::span<const Digest> keys, std::span<const Moment> ends);
    // What was restored ends at these moments, as far as it is there; of several of one node the earliest counts. What
    // hangs on something ends with it.
    void restore_ends(std::span<const Digest> keys, std::span<const Moment> ends);
    std::vector<Expired> take_expired() { return std::exchange(expired_, {}); }

    // For the pool to act upon after each call that changes something.
    std::vector<NodeId> take_lost_handovers() { return std::exchange(lost_handovers_, {}); }
    std::vector<PolicyEvent> take_events() { return std::exchange(events_, {}); }

    // Note every change from here on, or none; what was noted is forgotten.
    void watch(bool is_watched);
    // In the order of their happening. `drop_changes` after each look: they take memory, and keep salts.
    std::span<const Change> changes() const { return changes_; }
    void drop_changes();
    const std::string& salt_name(std::uint32_t number) const { return salts_[number].name; }
    // What is there, as if it all were added now; in no order.
    std::vector<Change> contents() const;

    // Walks the whole index. What is wrong; empty when nothing is.
    std::string check() const;
    // For tests of `check`: forget a node's records of one kind, whatever hangs on them.
    std::vector<Slot> remove_unchecked(NodeId id, bool is_state);

  private:
    // match.cc
    NodeId node_at(const Path& path, std::uint32_t blocks) const;
    std::uint32_t deepest_known(const Path& path, std::uint32_t whole) const;
    std::uint32_t attention_reach(const Query& query, std::uint32_t known) const;
    bool others_go_on(const Path& path, NodeId id, std::uint32_t blocks, bool is_deepest) const;
    bool is_resume_point(const Query& query, NodeId id, bool with_attention) const;

    // cover.cc
    bool has_all(NodeId id, const Needs& needs, bool states, GridId grid) const;
    bool covers(NodeId id, const GroupNeed& need, GridId grid, bool accepts_lossy) const;
    bool cover_span(RecordId& at, const GroupNeed& need, std::uint16_t span, GridId grid, bool accepts_lossy,
                    std::vector<RecordId>* chosen) const;
    RecordId first_of(NodeId id, std::uint32_t place) const;
    // One record that holds a name's units, or several that do together.
    bool find_records(NodeId id, std::uint32_t group, std::uint32_t span, Units units, GridId grid,
                      bool accepts_lossy, std::vector<RecordId>* found) const;
    Row row_of(RecordId id, std::uint32_t node) const;

    // write.cc
    bool known_nodes(const Path& path, std::vector<NodeId>& known) const;
    bool is_gapless(std::span<const Name> names, const std::vector<NodeId>& known, bool is_lossy,
                    std::uint32_t& gap_node) const;
    void use_grids(WriteSet& set);
    void drop_grids(WriteSet& set);
    void make_nodes(WriteSet& set, const Path& path, const std::string& salt);
    RecordId add_record(NodeId id, const Row& row, std::uint64_t cost_us, Residency residency);
    bool is_reachable(NodeId id, const Row& row, bool is_lossy) const;
    void rely(const WriteSet& set);
    void stop_relying(const WriteSet& set);
    void recycle_if_unused(NodeId id);
    void set_pending(const WriteSet& set, bool is_on);
    void release_nodes(const std::vector<NodeId>& nodes, std::uint32_t made);
    void drop_if_over(NodeId id, std::vector<Slot>& freed);

    // lives.cc
    void live_on(const WriteSet& set, Life life);
    Moment wanted_until(NodeId id) const;
    NodeId deepest_of(const Path& path, std::uint32_t& number) const;
    // restore.cc
    std::vector<NodeId> restore_nodes(std::uint32_t block_tokens, std::span<const KeptNode> nodes,
                                      std::span<const KeptRoot> roots, std::vector<NodeId>& made);
    bool restore_record(NodeId id, const Row& row, std::uint32_t number, std::vector<std::uint32_t>& rows_of,
                        std::vector<bool>& taken);
    void restore_order(const std::vector<NodeId>& made, const std::vector<std::uint32_t>& rows_of);
    // watch.cc
    Change change_of(NodeId id, bool is_state, std::uint64_t size_bytes, bool is_added) const;
    void note(NodeId id, bool is_state, std::uint64_t size_bytes, bool is_added);

    // evict.cc
    void everything_below(NodeId id, std::vector<Handle>& handles) const;
    void reserve_removal(std::span<const Handle> handles, std::vector<Slot>& freed);
    void remove(NodeId id, bool is_state, std::vector<Slot>& freed);
    void refresh(NodeId id, bool is_state);
    void unrank(NodeId id, bool is_state);
    void touch(std::span<const NodeId> nodes);
    void access(NodeId id, bool is_state);
    void log(PolicyEvent::Kind kind, NodeId id, bool is_state);
    std::uint64_t bytes_of(NodeId id, bool is_state) const;
    std::uint32_t count_of(NodeId id, bool is_state) const;
    bool is_held(NodeId id, bool is_state) const;
    bool closure(NodeId id, bool is_state, std::vector<Handle>& found) const;
    bool choose_one(Handle handle, std::vector<Handle>& found);
    void rank(NodeId id, bool is_state);
    void retire(NodeId id);
    void forget(NodeId id);
    void become_idle(NodeId id);
    void no_ghost(NodeId id);

    struct Salt {
        std::string name;
        std::uint64_t bytes = 0;
        std::uint32_t records = 0;
        std::uint32_t nodes = 0;  // that are no ghosts
        std::uint32_t roots = 0;
        UseOrder order{};  // of its evictables, if asked for
    };
    Salt& owner(NodeId id) { return salts_[salt_of(id)]; }
    std::uint32_t salt_of(NodeId id) const { return nodes_[nodes_[id].root].root; }
    std::uint32_t use_salt(const std::string& name);
    void drop_salt_root(std::uint32_t number);

    std::vector<bool> is_state_group_;
    std::uint32_t ghosts_max_;
    bool keeps_order_;
    bool keeps_salt_orders_ = false;
    Nodes nodes_;
    Records records_;
    Grids grids_;
    std::vector<Salt> salts_;
    std::unordered_map<std::string, std::uint32_t> salt_numbers_;
    std::vector<std::uint32_t> free_salts_;
    std::size_t salt_name_bytes_ = 0;
    std::size_t grid_holds_ = 0;  // of write sets
    UseOrder order_;
    UseOrder idle_;
    Chunked<OrderLinks> salt_links_;  // of the orders of use of single salts, by node
    std::uint32_t ghosts_ = 0;
    std::uint64_t committed_bytes_ = 0;
    std::uint64_t lost_records_ = 0;
    std::vector<Handle> chosen_;
    std::vector<std::size_t> chosen_ends_;  // in `chosen_`, after each evictable with all that goes with it
    std::uint64_t chosen_bytes_ = 0;
    std::uint64_t chosen_share_ = 0;  // of the salts that it is of: as `chosen_bytes_`, and the nodes that would go
    Handle cursor_ = none;
    bool is_choosing_ = false;
    std::vector<Handle> pushed_;
    std::size_t next_pushed_ = 0;
    std::vector<PolicyEvent> events_;
    bool is_watched_ = false;
    std::vector<Change> changes_;
    std::vector<NodeId> lost_handovers_;
    Lives lives_;
    std::vector<Expired> expired_;
    mutable std::vector<std::uint64_t> lacking_;
    mutable std::vector<NodeId> scratch_;
};

}  // namespace kvstore::index
