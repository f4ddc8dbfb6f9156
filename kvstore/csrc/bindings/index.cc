// The prefix index for Python: arrays in, arrays out, one call per match, write, commit and eviction.
#include "index_arguments.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <random>
#include <unordered_map>

#include "../index/counted.h"
#include "bindings.h"
#include "gil.h"

using namespace nanobind::literals;

namespace kvstore::bindings {
namespace {

// Found resume points with the index that they are of, for the keys of tails.
struct Finding {
    Found found;
    std::vector<Digest> tail_keys;       // of the candidates that are tails, in their order
    std::vector<Digest> open_tail_keys;  // of found.tails
};

nb::list candidates_to_python(const std::vector<kvstore::index::Candidate>& candidates, const std::vector<Digest>& keys,
                              bool with_node) {
    nb::list list;
    std::size_t tail = 0;
    for (const auto& candidate : candidates) {
        nb::object key = nb::none();
        if (candidate.tail != none) {
            key = key_bytes(keys[tail++]);
        }
        if (with_node) {
            list.append(nb::make_tuple(candidate.blocks, candidate.tokens, key, candidate.tail));
        } else {
            list.append(nb::make_tuple(candidate.blocks, candidate.tokens, key));
        }
    }
    return list;
}

// Keys and parents' keys one after the other, a row for each of them, and the salts that the last column numbers.
nb::tuple changes_to_python(const Index& index, std::span<const Change> changes) {
    std::string keys;
    std::string parents;
    std::vector<std::uint64_t> values;
    std::unordered_map<std::uint32_t, std::uint64_t> numbers;
    nb::list salts;
    keys.reserve(changes.size() * digest_bytes);
    parents.reserve(changes.size() * digest_bytes);
    values.reserve(changes.size() * change_columns);
    for (const Change& change : changes) {
        keys.append(reinterpret_cast<const char*>(change.key.bytes.data()), digest_bytes);
        parents.append(reinterpret_cast<const char*>(change.parent.bytes.data()), digest_bytes);
        const auto [found, is_new] = numbers.emplace(change.salt, numbers.size());
        if (is_new) {
            const std::string& name = index.salt_name(change.salt);
            salts.append(nb::bytes(name.data(), name.size()));
        }
        values.insert(values.end(),
                      {change.is_added, change.is_state, change.end_tokens, change.size_bytes, found->second});
    }
    return nb::make_tuple(nb::bytes(keys.data(), keys.size()), nb::bytes(parents.data(), parents.size()),
                          make_table(std::move(values), change_columns), salts);
}

class PrefixIndex {
  public:
    PrefixIndex(std::vector<bool> is_state_group, std::uint32_t ghosts_max, bool keeps_order, bool keeps_salt_orders)
        : group_count_(is_state_group.size()), index_(std::move(is_state_group), ghosts_max, keeps_order, seed()) {
        if (keeps_salt_orders) {
            index_.keep_salt_orders();
        }
    }

    PrefixIndex(const PrefixIndex&) = delete;
    PrefixIndex& operator=(const PrefixIndex&) = delete;

    const Index& index() const { return index_; }
    Index& index() { return index_; }

    Finding match(const nb::tuple& packed, const TokenIds& token_ids, std::uint32_t cap_tokens, const Needs& needs,
                  const std::optional<nb::tuple>& packed_grid, std::uint32_t candidates_max,
                  const std::vector<NodeId>& excluded) const {
        const PackedPath path(packed);
        const PackedGrid grid(packed_grid);
        const std::span<const std::uint32_t> ids(token_ids.data(), token_ids.size());
        Finding finding;
        finding.found = index_.match({*path, ids, cap_tokens, &needs, grid.get(), candidates_max, excluded});
        for (const auto& candidate : finding.found.candidates) {
            if (candidate.tail != none) {
                finding.tail_keys.push_back(index_.nodes().key(candidate.tail));
            }
        }
        for (const auto& tail : finding.found.tails) {
            finding.open_tail_keys.push_back(index_.nodes().key(tail.tail));
        }
        return finding;
    }

    std::optional<Held> collect(const nb::tuple& packed, const Needs& needs, const std::optional<nb::tuple>& packed_grid,
                                const std::optional<std::pair<AnyArray, nb::bytes>>& places) const {
        const PackedPath path(packed);
        const PackedGrid grid(packed_grid);
        if (!places) {
            return index_.collect(*path, needs, grid.get(), nullptr);
        }
        const auto values = uint64_values(places->first, place_columns, "places");
        const Digest* digests = digests_of(places->second, "the digests");
        std::vector<PlaceGrid> wanted;
        for (std::size_t at = 0; at < values.size(); at += place_columns) {
            if (values[at + 3] >= size_of(places->second) / digest_bytes) {
                throw std::out_of_range("a place names a digest that is not there");
            }
            wanted.push_back({narrow<std::uint32_t>(values[at], "node"), narrow<std::uint16_t>(values[at + 1], "group"),
                              narrow<std::uint16_t>(values[at + 2], "span"), digests[values[at + 3]]});
        }
        std::sort(wanted.begin(), wanted.end(),
                  [](const PlaceGrid& left, const PlaceGrid& right) { return left.place() < right.place(); });
        return index_.collect(*path, needs, nullptr, &wanted);
    }

    std::vector<std::uint32_t> missing(const nb::tuple& packed, const AnyArray& table, const nb::bytes& digests,
                                       bool is_lossy) const {
        const PackedPath path(packed);
        std::vector<std::uint32_t> absent;
        std::uint32_t number = 0;
        for (const Name& name : names_of(*path, table, digests, group_count_)) {
            if (!index_.is_there(*path, name, is_lossy)) {
                absent.push_back(number);
            }
            ++number;
        }
        return absent;
    }

    WriteSet plan(const nb::tuple& packed, const AnyArray& table, const nb::bytes& digests, bool is_lossy) const {
        const PackedPath path(packed);
        return index_.plan(*path, names_of(*path, table, digests, group_count_), is_lossy);
    }

    void enter(WriteSet& set, const nb::tuple& packed, const nb::bytes& salt, std::vector<NodeId> basis_tail,
               std::vector<std::uint32_t> resume_nodes) {
        const PackedPath path(packed);
        for (const std::uint32_t number : resume_nodes) {
            if (number >= (*path).size()) {
                throw std::out_of_range("a resume node is not of this path");
            }
        }
        check_nodes(basis_tail);
        if ((*path).size() == 0) {
            throw std::invalid_argument("a write has at least one node: an empty prompt has nothing to store");
        }
        index_.enter(set, *path, std::string(salt.c_str(), salt.size()), std::move(basis_tail), std::move(resume_nodes));
    }

    std::vector<std::uint32_t> commit(const WriteSet& set, const AnyArray& ready_array, const AnyArray& cost_array,
                                      std::uint8_t tier, std::uint8_t codec, bool is_lossy, Moment ends_at,
                                      std::uint32_t committed_nodes) {
        const auto ready = uint64_values(ready_array, 0, "ready");
        const auto costs = uint64_values(cost_array, 0, "costs_us");
        if (committed_nodes > set.nodes.size()) {
            throw std::out_of_range("more nodes are committed than a writer has");
        }
        if (ready.size() != costs.size() || set.nodes.empty()) {
            throw std::invalid_argument("each record that is committed has a cost, and a node");
        }
        for (const std::uint64_t number : ready) {
            if (number >= set.missing.size()) {
                throw std::out_of_range("a record that was not reserved cannot be committed");
            }
        }
        return index_.commit(set, ready, costs, {tier, codec, is_lossy}, {ends_at, committed_nodes});
    }

    // `states`: at how many blocks, and of how many bytes. How it went, bytes written, bytes evicted.
    nb::tuple write_counted(const nb::tuple& packed, const nb::bytes& salt, const Needs& needs, std::uint32_t block_bytes,
                            const std::vector<std::pair<std::uint32_t, std::uint32_t>>& states, double capacity_bytes,
                            std::uint64_t records_max) {
        const PackedPath path(packed);
        std::vector<CountedState> counted_states;
        for (const auto& [blocks, size_bytes] : states) {
            if (blocks <= (counted_states.empty() ? 0 : counted_states.back().blocks) || blocks > (*path).blocks) {
                throw std::out_of_range("states are at ascending lengths of the path, in blocks from 1");
            }
            counted_states.push_back({blocks, size_bytes});
        }
        const bool is_known =
            std::ranges::all_of(needs.groups, [&](const auto& need) { return need.group < group_count_; });
        if ((*path).size() == 0 || (*path).tail_key != nullptr || !is_known || !(capacity_bytes >= 0)) {
            throw std::invalid_argument("a counted write has whole blocks, groups of this index and a capacity");
        }
        const Counted counted = kvstore::index::write_counted(
            index_, {*path, std::string(salt.c_str(), salt.size()), &needs, block_bytes, counted_states, capacity_bytes,
                     records_max});
        return nb::make_tuple(outcome_name(counted.outcome), counted.written_bytes, counted.evicted_bytes);
    }

    std::uint32_t set_end(const nb::tuple& packed, Moment at, std::uint32_t after_tokens, std::uint32_t meant_tokens) {
        return index_.set_end(*PackedPath(packed), at, after_tokens, meant_tokens);
    }

    std::uint32_t stored_tokens(const nb::tuple& packed) const { return index_.stored_tokens(*PackedPath(packed)); }

    Table ends_of(const nb::bytes& keys) const {
        return make_table(index_.ends_of({digests_of(keys, "the keys"), size_of(keys) / digest_bytes}), ends_columns);
    }

    void prolong(const nb::bytes& keys, const AnyArray& ends) {
        index_.prolong({digests_of(keys, "the keys"), size_of(keys) / digest_bytes}, ends_by(keys, ends));
    }

    void restore_ends(const nb::bytes& keys, const AnyArray& ends) {
        index_.restore_ends({digests_of(keys, "the keys"), size_of(keys) / digest_bytes}, ends_by(keys, ends));
    }

    nb::list take_expired() {
        nb::list expired;
        for (const Expired& each : index_.take_expired()) {
            expired.append(nb::make_tuple(key_bytes(each.key), each.is_state));
        }
        return expired;
    }

    std::uint64_t choose(std::uint64_t target_bytes) { return index_.choose(target_bytes); }

    // Names of evictables that the policy outside ranks first; what is not there is passed over.
    void push_victims(const nb::bytes& keys, const nb::bytes& are_states) {
        index_.push_victims(handles_of(keys, are_states));
    }

    std::uint64_t choose_in(const nb::bytes& salt, std::uint64_t target_bytes) {
        return index_.choose_in(std::string(salt.c_str(), salt.size()), target_bytes);
    }

    std::uint64_t choose_named_in(const nb::bytes& salt, const nb::bytes& keys, const nb::bytes& are_states,
                                  std::uint64_t target_bytes) {
        return index_.choose_in(std::string(salt.c_str(), salt.size()), handles_of(keys, are_states), target_bytes);
    }

    std::vector<Handle> handles_of(const nb::bytes& keys, const nb::bytes& are_states) const {
        const Digest* digests = digests_of(keys, "the keys");
        if (size_of(keys) != size_of(are_states) * digest_bytes) {
            throw std::invalid_argument("each victim has a key and a kind");
        }
        std::vector<Handle> handles;
        for (std::size_t at = 0; at < size_of(are_states); ++at) {
            const Handle handle = index_.ranked_handle(digests[at], are_states.c_str()[at] != 0);
            if (handle != none) {
                handles.push_back(handle);
            }
        }
        return handles;
    }

    nb::list take_events() {
        nb::list events;
        for (const PolicyEvent& event : index_.take_events()) {
            events.append(nb::make_tuple(static_cast<int>(event.kind), event.handle, key_bytes(event.key),
                                         event.is_state, event.size_bytes, event.end_tokens));
        }
        return events;
    }

    // Which of the records were taken, a byte each.
    nb::bytes restore(std::uint32_t block_tokens, const nb::tuple& packed_nodes, const AnyArray& table,
                      const nb::bytes& digests) {
        const PackedNodes nodes(packed_nodes);
        if (block_tokens == 0) {
            throw std::invalid_argument("a block has at least one token");
        }
        const std::vector<Row> rows = rows_of(nodes.size(), table, digests, group_count_);
        std::vector<bool> taken;
        {
            const GilReleased released;
            taken = index_.restore(block_tokens, nodes.nodes(), nodes.roots(), rows);
        }
        return flag_bytes(taken);
    }

    nb::tuple survey(std::uint64_t mask, std::uint64_t value, bool in_order) const {
        Survey found;
        {
            const GilReleased released;
            found = index_.survey({mask, value}, in_order);
        }
        return nb::make_tuple(nodes_to_python(index_, found.nodes), rows_to_python(found.rows));
    }

    // Which of the records were still there, a byte each. Rows of `moves`: the slot until now, the slot from now on.
    nb::bytes relocate(const nb::bytes& keys, const AnyArray& moves) {
        constexpr std::size_t columns = 6;
        const auto values = uint64_values(moves, columns, "moves");
        const Digest* digests = digests_of(keys, "the keys");
        if (size_of(keys) / digest_bytes * columns != values.size()) {
            throw std::invalid_argument("each record that moves has a key and two slots");
        }
        std::vector<bool> moved;
        for (std::size_t at = 0; at < values.size(); at += columns) {
            const Slot from{values[at], values[at + 1], narrow<std::uint32_t>(values[at + 2], "slot of bytes")};
            const Slot to{values[at + 3], values[at + 4], narrow<std::uint32_t>(values[at + 5], "slot of bytes")};
            moved.push_back(index_.relocate(digests[at / columns], from, to));
        }
        return flag_bytes(moved);
    }

    nb::tuple take_changes() {
        nb::tuple taken = changes_to_python(index_, index_.changes());
        index_.drop_changes();
        return taken;
    }

    nb::dict bytes_by_salt() const {
        nb::dict bytes;
        for (const auto& [name, size] : index_.bytes_by_salt()) {
            bytes[nb::bytes(name.data(), name.size())] = size;
        }
        return bytes;
    }

    std::optional<NodeId> find(const nb::bytes& key) const {
        if (size_of(key) != digest_bytes) {
            return std::nullopt;
        }
        const NodeId id = index_.find(digest_of(key, "the key"));
        return id == none ? std::nullopt : std::optional(id);
    }

    void check_nodes(const std::vector<NodeId>& nodes) const {
        for (const NodeId id : nodes) {
            if (!index_.nodes().is_live(id)) {
                throw std::out_of_range("there is no such node");
            }
        }
    }
    NodeId live(NodeId id) const {
        check_nodes({id});
        return id;
    }

  private:
    static constexpr std::size_t ends_columns = 3;

    static std::span<const Moment> ends_by(const nb::bytes& keys, const AnyArray& ends) {
        const auto values = uint64_values(ends, ends_columns, "ends");
        if (size_of(keys) / digest_bytes * ends_columns != values.size()) {
            throw std::invalid_argument("each node has a key and three ends");
        }
        return values;
    }

    static const char* outcome_name(CountedOutcome outcome) {
        switch (outcome) {
            case CountedOutcome::written:
                return "written";
            case CountedOutcome::no_room:
                return "no room";
            case CountedOutcome::too_many:
                return "too many";
            case CountedOutcome::wrong_path:
                return "wrong path";
        }
        throw std::logic_error("a counted write ends in no known way");
    }

    static std::uint64_t seed() {
        std::random_device source;
        return (std::uint64_t{source()} << 32) | source();
    }

    std::size_t group_count_;
    Index index_;
};

template <Flag flag>
bool node_has(const PrefixIndex& self, NodeId id) {
    return self.index().nodes().has(self.live(id), flag);
}

void set_slots(WriteSet& set, const AnyArray& table) {
    const auto values = uint64_values(table, 3, "slots");
    if (values.size() != set.missing.size() * 3) {
        throw std::invalid_argument("each missing record takes one slot");
    }
    for (std::size_t number = 0; number < set.missing.size(); ++number) {
        set.missing[number].slot = {values[number * 3], values[number * 3 + 1],
                                    narrow<std::uint32_t>(values[number * 3 + 2], "slot of bytes")};
    }
}

Needs make_needs(const std::vector<nb::tuple>& groups, bool accepts_lossy) {
    Needs needs;
    needs.accepts_lossy = accepts_lossy;
    for (const nb::tuple& group : groups) {
        needs.groups.emplace_back(nb::cast<std::uint8_t>(group[0]), nb::cast<bool>(group[1]),
                                  nb::cast<std::uint16_t>(group[2]), nb::cast<std::vector<std::uint16_t>>(group[3]));
        (needs.groups.back().is_state ? needs.states : needs.attention) = true;
    }
    return needs;
}

}  // namespace

void bind_index(nb::module_& module) {
    nb::class_<Needs>(module, "Needs", "The records that a worker needs at each node.")
        .def("__init__",
             [](Needs* self, const std::vector<nb::tuple>& groups, bool accepts_lossy) {
                 new (self) Needs(make_needs(groups, accepts_lossy));
             },
             "groups"_a, "accepts_lossy"_a = false);

    nb::class_<Finding>(module, "Finding", "What a match found.")
        .def_prop_ro("tokens",
                     [](const Finding& self) {
                         return self.found.candidates.empty() ? 0U : self.found.candidates.front().tokens;
                     })
        .def_prop_ro("candidates",
                     [](const Finding& self) {
                         return candidates_to_python(self.found.candidates, self.tail_keys, false);
                     })
        .def_prop_ro("has_tails", [](const Finding& self) { return !self.found.tails.empty(); })
        .def_prop_ro("tails",
                     [](const Finding& self) {
                         return candidates_to_python(self.found.tails, self.open_tail_keys, true);
                     })
        .def_prop_ro("branch_points", [](const Finding& self) { return self.found.branch_points; })
        .def_prop_ro("attention_tokens", [](const Finding& self) { return self.found.attention_tokens; })
        .def_prop_ro("pending_tokens", [](const Finding& self) { return self.found.pending_tokens; })
        .def_prop_ro("evicted_state_tokens", [](const Finding& self) { return self.found.evicted_state_tokens; })
        .def_prop_ro("evicted_attention_tokens",
                     [](const Finding& self) { return self.found.evicted_attention_tokens; })
        .def_prop_ro("foreign_state_tokens", [](const Finding& self) { return self.found.foreign_state_tokens; })
        .def_prop_ro("is_other_grid", [](const Finding& self) { return self.found.is_other_grid; })
        .def_prop_ro("is_other_shard", [](const Finding& self) { return self.found.is_other_shard; });

    nb::class_<Held>(module, "HeldRows", "The records of a resume point.")
        .def_prop_ro("last_node", [](const Held& self) { return self.nodes.back(); })
        .def("rows", [](const Held& self) { return rows_to_python(self.rows); });

    nb::class_<WriteSet>(module, "WriteSet", "What a writer reserves, and the nodes that it relies on.")
        .def_prop_ro("is_wrong_path", [](const WriteSet& self) { return self.status == PlanStatus::wrong_path; })
        .def_prop_ro("gap_node",
                     [](const WriteSet& self) {
                         return self.status == PlanStatus::gap ? std::optional(self.gap_node) : std::nullopt;
                     })
        .def_prop_ro("new_nodes",
                     [](const WriteSet& self) { return self.new_nodes + (self.is_new_root ? 1U : 0U); })
        .def_prop_ro("last_node", [](const WriteSet& self) { return self.nodes.at(self.nodes.size() - 1); })
        .def("missing", [](const WriteSet& self) { return rows_to_python(self.missing); })
        .def("held", [](const WriteSet& self) { return rows_to_python(self.held); })
        .def("set_slots", &set_slots, "slots"_a);

    auto index = nb::class_<PrefixIndex>(
        module, "PrefixIndex",
        "Which records are there, for which prefix. Not thread-safe: the pool calls it under its lock.");
    index.def(nb::init<std::vector<bool>, std::uint32_t, bool, bool>(), "is_state_group"_a, "ghosts_max"_a,
              "keeps_order"_a, "keeps_salt_orders"_a = false)
        .def("__len__", [](const PrefixIndex& self) { return self.index().node_count(); })
        .def_prop_ro("ghost_count", [](const PrefixIndex& self) { return self.index().ghost_count(); })
        .def_prop_ro("record_count", [](const PrefixIndex& self) { return self.index().record_count(); })
        .def_prop_ro("committed_bytes", [](const PrefixIndex& self) { return self.index().committed_bytes(); })
        .def_prop_ro("lost_records", [](const PrefixIndex& self) { return self.index().lost_records(); })
        .def_prop_ro("memory_bytes", [](const PrefixIndex& self) { return self.index().memory_bytes(); })
        .def_prop_ro("allocated_bytes", [](const PrefixIndex& self) { return self.index().allocated_bytes(); })
        .def_prop_ro("bytes_by_salt", &PrefixIndex::bytes_by_salt)
        .def("share_of",
             [](const PrefixIndex& self, const nb::bytes& salt) {
                 return self.index().share_of(std::string(salt.c_str(), salt.size()));
             },
             "salt"_a)
        .def_prop_ro("node_share_bytes", [](const PrefixIndex& self) { return self.index().node_share(); })
        .def("find", &PrefixIndex::find, "key"_a)
        .def("match", &PrefixIndex::match, "path"_a, "token_ids"_a, "cap_tokens"_a, "needs"_a, "grid"_a.none(),
             "candidates_max"_a, "excluded"_a)
        .def("collect", &PrefixIndex::collect, "path"_a, "needs"_a, "grid"_a.none(), "places"_a.none() = nb::none())
        .def("hold", [](PrefixIndex& self, const Held& held) { self.index().hold(held); }, "held"_a)
        .def("release", [](PrefixIndex& self, const Held& held) { return slot_table(self.index().release(held)); },
             "held"_a)
        .def("missing", &PrefixIndex::missing, "path"_a, "names"_a, "digests"_a, "is_lossy"_a = false)
        .def("plan", &PrefixIndex::plan, "path"_a, "names"_a, "digests"_a, "is_lossy"_a = false)
        .def("enter", &PrefixIndex::enter, "writes"_a, "path"_a, "salt"_a, "basis_tail"_a, "resume_nodes"_a)
        .def("undo", [](PrefixIndex& self, WriteSet& set) { self.index().undo(set); }, "writes"_a)
        .def("commit", &PrefixIndex::commit, "writes"_a, "ready"_a, "costs_us"_a, "tier"_a = 0, "codec"_a = 0,
             "is_lossy"_a = false, "ends_at_us"_a = lasting, "committed_nodes"_a = 0)
        .def("leave", [](PrefixIndex& self, WriteSet& set) { self.index().leave(set); }, "writes"_a)
        .def("let_go", [](PrefixIndex& self, WriteSet& set) { return slot_table(self.index().let_go(set)); },
             "writes"_a)
        .def("write_counted", &PrefixIndex::write_counted, "path"_a, "salt"_a, "needs"_a, "block_bytes"_a, "states"_a,
             "capacity_bytes"_a, "records_max"_a)
        .def("set_end", &PrefixIndex::set_end, "path"_a, "ends_at_us"_a, "after_tokens"_a = none,
             "meant_tokens"_a = 0)
        .def("stored_tokens", &PrefixIndex::stored_tokens, "path"_a)
        .def("expire",
             [](PrefixIndex& self, Moment now_us, bool even_written) {
                 return slot_table(self.index().expire(now_us, even_written));
             },
             "now_us"_a, "even_written"_a = false)
        .def("take_expired", &PrefixIndex::take_expired)
        .def("ends_of", &PrefixIndex::ends_of, "keys"_a)
        .def("prolong", &PrefixIndex::prolong, "keys"_a, "ends_us"_a)
        .def("restore_ends", &PrefixIndex::restore_ends, "keys"_a, "ends_us"_a)
        .def_prop_ro("next_end_us", [](const PrefixIndex& self) { return self.index().next_end(); })
        .def_prop_ro("life_bytes", [](const PrefixIndex& self) { return self.index().life_bytes(); })
        .def("evict",
             [](PrefixIndex& self, NodeId id, bool states_only) {
                 return slot_table(self.index().evict(self.live(id), states_only));
             },
             "node"_a, "states_only"_a)
        .def("condemn",
             [](PrefixIndex& self, NodeId id, bool is_state) {
                 return slot_table(self.index().condemn(self.live(id), is_state));
             },
             "node"_a, "is_state"_a)
        .def("condemn_all",
             [](PrefixIndex& self, std::uint64_t mask, std::uint64_t value) {
                 return slot_table(self.index().condemn_all({mask, value}));
             },
             "mask"_a, "value"_a)
        .def("touch_path",
             [](PrefixIndex& self, const nb::tuple& packed) { self.index().touch_path(*PackedPath(packed)); }, "path"_a)
        .def("restore", &PrefixIndex::restore, "block_tokens"_a, "nodes"_a, "records"_a, "digests"_a)
        .def("survey", &PrefixIndex::survey, "mask"_a, "value"_a, "in_order"_a = false)
        .def("relocate", &PrefixIndex::relocate, "keys"_a, "moves"_a)
        .def("has_slot",
             [](const PrefixIndex& self, NodeId id, bool is_state, std::uint64_t slot, std::uint64_t generation,
                std::uint32_t size_bytes) {
                 return self.index().has_slot(self.live(id), is_state, {slot, generation, size_bytes});
             },
             "node"_a, "is_state"_a, "slot_index"_a, "slot_generation"_a, "slot_bytes"_a)
        .def("drop_ghosts", [](PrefixIndex& self, std::uint32_t count) { return self.index().drop_ghosts(count); },
             "count"_a)
        .def("choose", &PrefixIndex::choose, "target_bytes"_a)
        .def("choose_in", &PrefixIndex::choose_in, "salt"_a, "target_bytes"_a)
        .def("choose_named_in", &PrefixIndex::choose_named_in, "salt"_a, "keys"_a, "are_states"_a, "target_bytes"_a)
        .def("push_victims", &PrefixIndex::push_victims, "keys"_a, "are_states"_a)
        .def_prop_ro("pushed_count", [](const PrefixIndex& self) { return self.index().pushed_count(); })
        .def_prop_ro("chosen_count", [](const PrefixIndex& self) { return self.index().chosen_count(); })
        .def("chosen_slots",
             [](const PrefixIndex& self, std::size_t count) {
                 return slot_table(self.index().chosen_slots(std::min(count, self.index().chosen_count())));
             },
             "count"_a)
        .def("trim_choice",
             [](PrefixIndex& self, std::size_t count) {
                 self.index().trim_choice(std::min(count, self.index().chosen_count()));
             },
             "count"_a)
        .def("evict_chosen", [](PrefixIndex& self) { return slot_table(self.index().evict_chosen()); })
        .def("drop_choice", [](PrefixIndex& self) { self.index().drop_choice(); })
        .def("take_events", &PrefixIndex::take_events)
        .def("watch", [](PrefixIndex& self, bool is_watched) { self.index().watch(is_watched); }, "is_watched"_a)
        .def_prop_ro("change_count", [](const PrefixIndex& self) { return self.index().changes().size(); })
        .def("take_changes", &PrefixIndex::take_changes)
        .def("contents",
             [](const PrefixIndex& self) { return changes_to_python(self.index(), self.index().contents()); })
        .def("take_lost_handovers", [](PrefixIndex& self) { return self.index().take_lost_handovers(); })
        .def("holds_records",
             [](const PrefixIndex& self, NodeId id) { return self.index().holds_records(self.live(id)); }, "node"_a)
        .def("salt",
             [](const PrefixIndex& self, NodeId id) {
                 const std::string& salt = self.index().salt(self.live(id));
                 return nb::bytes(salt.data(), salt.size());
             },
             "node"_a)
        .def("is_tail", &node_has<kvstore::index::is_tail>, "node"_a)
        .def("is_transient", &node_has<kvstore::index::is_transient>, "node"_a)
        .def("set_transient",
             [](PrefixIndex& self, NodeId id, bool is_set) {
                 self.index().mark(self.live(id), kvstore::index::is_transient, is_set);
             },
             "node"_a, "is_set"_a)
        .def("set_handover",
             [](PrefixIndex& self, NodeId id, bool is_set) {
                 self.index().mark(self.live(id), kvstore::index::has_handover, is_set);
             },
             "node"_a, "is_set"_a)
        .def("remove_unchecked",
             [](PrefixIndex& self, NodeId id, bool is_state) {
                 return slot_table(self.index().remove_unchecked(self.live(id), is_state));
             },
             "node"_a, "is_state"_a)
        .def("check", [](const PrefixIndex& self) { return self.index().check(); });
    index.attr("LASTING_US") = lasting;
    index.attr("NODE_BYTES") = Index::node_bytes;
    index.attr("RECORD_BYTES") = Index::record_bytes;
}

}  // namespace kvstore::bindings
