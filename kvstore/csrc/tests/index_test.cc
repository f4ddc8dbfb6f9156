// The index against a plain model: prefixes as lists of ids, records as sets of units. Random, from fixed seeds.
#include "../index/index.h"

#include <map>
#include <memory>
#include <random>
#include <set>

#include "check.h"

using namespace kvstore::index;
using kvstore::testing::check;

namespace {

using Ids = std::vector<std::uint32_t>;

constexpr std::uint32_t block_tokens = 2;
constexpr std::uint16_t unit_count = 2;
constexpr std::uint32_t slot_bytes = 4096;

std::uint64_t mix(std::uint64_t value) {
    value += 0x9e3779b97f4a7c15ULL;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
    return value ^ (value >> 31);
}

// A stand-in for SHA-256: what matters is that equal prefixes have equal keys and others do not.
Digest digest_of(const Digest& parent, std::span<const std::uint32_t> ids) {
    std::uint64_t state = 0;
    std::memcpy(&state, parent.bytes.data(), sizeof state);
    for (const std::uint32_t id : ids) {
        state = mix(state ^ (id + 1));
    }
    Digest digest{};
    for (std::size_t part = 0; part < 4; ++part) {
        const std::uint64_t word = mix(state + part);
        std::memcpy(digest.bytes.data() + 8 * part, &word, sizeof word);
    }
    return digest;
}

struct Prompt {
    Prompt(Ids ids_, std::uint32_t salt) : ids(std::move(ids_)) {
        root = digest_of(Digest{}, std::array{salt + 1000});
        Digest parent = root;
        const std::span<const std::uint32_t> all(ids);
        for (std::size_t at = 0; at + block_tokens <= ids.size(); at += block_tokens) {
            parent = digest_of(parent, all.subspan(at, block_tokens));
            keys.push_back(parent);
        }
        tail_ids.assign(ids.begin() + static_cast<std::ptrdiff_t>(keys.size() * block_tokens), ids.end());
        if (!tail_ids.empty()) {
            tail_key = digest_of(parent, tail_ids);
        }
    }
    Path path() const {
        return {root, block_tokens, keys.data(), static_cast<std::uint32_t>(keys.size()),
                tail_ids.empty() ? nullptr : &tail_key, tail_ids};
    }
    Ids prefix(std::uint32_t node) const {
        return {ids.begin(), ids.begin() + path().end_tokens(node)};
    }

    Ids ids;
    Digest root{};
    std::vector<Digest> keys;
    Ids tail_ids;
    Digest tail_key{};
};

struct Place {
    std::uint32_t salt;
    Ids ids;
    std::uint16_t group;  // 0 attention, 1 state
    auto operator<=>(const Place&) const = default;
};

struct Writer {
    Prompt prompt;
    std::uint32_t salt;
    WriteSet set;
};

struct Reader {
    Prompt prompt;
    std::uint32_t salt;
    Held held;
    bool is_damaged = false;
};

class Machine {
  public:
    Machine(std::uint64_t seed, bool keeps_order)
        : random_(seed),
          keeps_order_(keeps_order),
          is_watched_(seed % 4 != 1),
          index_({false, true}, 20, keeps_order, seed) {
        if (seed % 2 == 0) {
            index_.keep_salt_orders();
        }
        for (std::uint16_t unit = 0; unit <= unit_count; ++unit) {
            // Whole, then each half.
            Needs needs;
            std::vector<std::uint16_t> units{0, 1};
            if (unit != unit_count) {
                units = {unit};
            }
            needs.groups.emplace_back(std::uint8_t{0}, false, std::uint16_t{1}, units);
            needs.groups.emplace_back(std::uint8_t{1}, true, std::uint16_t{1}, units);
            needs.attention = needs.states = true;
            needs_.push_back(needs);
        }
        index_.watch(is_watched_);
    }

    void run(int steps) {
        for (int step = 0; step < steps; ++step) {
            switch (draw(15)) {
                case 0:
                case 1:
                case 2:
                    begin();
                    break;
                case 3:
                case 4:
                    commit();
                    break;
                case 5:
                    abort();
                    break;
                case 6:
                    hold();
                    break;
                case 7:
                    release();
                    break;
                case 8:
                    evict();
                    break;
                case 9:
                    condemn();
                    break;
                case 10:
                    make_room();
                    break;
                case 11:
                    make_room_in_salt();
                    break;
                case 12:
                    expire();
                    break;
                case 13:
                    set_end();
                    break;
                default:
                    match();
            }
            std::string wrong = index_.check();
            check(wrong.empty(), wrong);
            mirror();
            wrong = index_.check();
            check(wrong.empty(), wrong);
            check(index_.record_count() == total(), "records were lost or invented");
            check(index_.memory_bytes() <= index_.allocated_bytes() + (1 << 20), "memory is miscounted");
        }
        while (!writers_.empty()) {
            abort();
        }
        while (!readers_.empty()) {
            release();
        }
        check(index_.evict_chosen().empty(), "nothing was chosen");
        push_all();
        index_.choose(~std::uint64_t{0});
        forget(index_.evict_chosen());
        check(index_.record_count() == 0 && total() == 0, "what nobody holds can be evicted");
        index_.drop_ghosts(1000);
        mirror();
        check(index_.check().empty() && index_.memory_bytes() == 0, "the empty index holds something");
    }

  private:
    std::uint32_t draw(std::uint32_t below) { return static_cast<std::uint32_t>(random_() % below); }

    Prompt draw_prompt(std::uint32_t salt) {
        Ids ids(1 + draw(9));
        for (std::uint32_t& id : ids) {
            id = draw(2);
        }
        return {ids, salt};
    }

    std::size_t total() const {
        std::size_t count = 0;
        for (const auto& [place, parts] : model_) {
            count += parts.size();
        }
        return count;
    }

    bool model_covers(const Place& place, Units units) const {
        const auto found = model_.find(place);
        for (std::uint16_t unit = units.start; unit < units.stop; ++unit) {
            const auto holds = [&](const std::pair<Units, Slot>& part) {
                return part.first.start <= unit && unit < part.first.stop;
            };
            if (found == model_.end() || std::none_of(found->second.begin(), found->second.end(), holds)) {
                return false;
            }
        }
        return true;
    }

    void begin() {
        if (writers_.size() >= 4) {
            return;
        }
        const std::uint32_t salt = draw(2);
        Prompt prompt = draw_prompt(salt);
        const std::array<Units, 3> shards{Units{0, 2}, Units{0, 1}, Units{1, 2}};
        const Units units = shards[draw(3)];
        const Path path = prompt.path();
        std::vector<Name> names;
        for (std::uint32_t node = draw(3) == 0 ? draw(path.size()) : 0; node < path.size(); ++node) {
            names.push_back({node, 0, 0, units, Digest{}});
        }
        names.push_back({path.size() - 1, 1, 0, units, Digest{}});
        WriteSet set = index_.plan(path, names, false);
        const std::uint32_t first = names.front().node;
        const bool is_gapless =
            first == 0 || names.front().group == 1 || model_covers({salt, prompt.prefix(first - 1), 0}, units);
        check((set.status == PlanStatus::ok) == is_gapless, "a gap was overlooked or invented");
        if (!is_gapless) {
            return;
        }
        std::size_t missing = 0;
        for (const Name& name : names) {
            missing += !model_covers({salt, prompt.prefix(name.node), name.group}, units);
        }
        check(set.missing.size() == missing, "the plan differs from the model");
        index_.enter(set, path, salt == 0 ? "" : "tenant", {}, {path.size() - 1});
        if (draw(8) == 0) {
            index_.undo(set);
            return;
        }
        for (Row& row : set.missing) {
            row.slot = {next_slot_++, 0, slot_bytes};
        }
        writers_.push_back({std::move(prompt), salt, std::move(set)});
    }

    void commit() {
        if (writers_.empty()) {
            return;
        }
        const std::size_t number = draw(static_cast<std::uint32_t>(writers_.size()));
        Writer& writer = writers_[number];
        std::vector<std::uint64_t> ready;
        for (std::uint64_t row = 0; row < writer.set.missing.size(); ++row) {
            ready.push_back(row);
        }
        std::set<std::uint32_t> expected;
        std::vector<std::uint32_t> order(ready.begin(), ready.end());
        std::stable_sort(order.begin(), order.end(), [&](std::uint32_t left, std::uint32_t right) {
            return writer.set.missing[left].node < writer.set.missing[right].node;
        });
        for (const std::uint32_t at : order) {
            const Row& row = writer.set.missing[at];
            const Place place{writer.salt, writer.prompt.prefix(row.node), row.group};
            const bool is_reachable = row.group == 1 || row.node == 0 ||
                                      model_covers({writer.salt, writer.prompt.prefix(row.node - 1), 0}, row.units);
            if (model_covers(place, row.units) || !is_reachable) {
                expected.insert(at);
            } else {
                model_[place].emplace_back(row.units, row.slot);
            }
        }
        const std::vector<std::uint64_t> costs(ready.size(), 7);
        const Path path = writer.prompt.path();
        const Moment ends_at = draw(2) == 0 ? lasting : now_ + draw(40);
        const auto given_back = index_.commit(writer.set, ready, costs, {}, {ends_at, path.size()});
        check(std::set(given_back.begin(), given_back.end()) == expected, "other records were given back");
        for (std::uint32_t node = 0; node < path.size(); ++node) {
            live_on({writer.salt, writer.prompt.prefix(node), 0}, ends_at);
        }
        const Place last{writer.salt, writer.prompt.ids, 1};
        live_on(last, ends_at);
        if (holds_records(last)) {
            Moment& prompts = prompts_[{last.salt, last.ids, 0}];
            prompts = std::max(prompts, ends_at);
        }
        end(number);
    }

    void end(std::size_t number) {
        index_.leave(writers_[number].set);
        check(index_.let_go(writers_[number].set).empty(), "letting go freed something");
        writers_.erase(writers_.begin() + static_cast<std::ptrdiff_t>(number));
    }

    void abort() {
        if (!writers_.empty()) {
            end(draw(static_cast<std::uint32_t>(writers_.size())));
        }
    }

    void match() {
        const std::uint32_t salt = draw(2);
        const Prompt prompt = draw_prompt(salt);
        const std::size_t which = draw(3);
        const Needs& needs = needs_[which];
        const Units units = which == 2 ? Units{0, 2} : Units{static_cast<std::uint16_t>(which),
                                                             static_cast<std::uint16_t>(which + 1)};
        const auto cap = static_cast<std::uint32_t>(prompt.ids.size());
        const Found found = index_.match({prompt.path(), prompt.ids, cap, &needs, nullptr, 64, {}});
        std::vector<std::uint32_t> expected;
        for (std::uint32_t tokens = cap; tokens > 0; --tokens) {
            const Prompt part(Ids(prompt.ids.begin(), prompt.ids.begin() + tokens), salt);
            const Path path = part.path();
            bool is_there = model_covers({salt, part.ids, 1}, units);
            for (std::uint32_t node = 0; node < path.size(); ++node) {
                is_there = is_there && model_covers({salt, part.prefix(node), 0}, units);
            }
            if (is_there) {
                expected.push_back(tokens);
            }
            const bool is_held = index_.collect(path, needs, nullptr, nullptr).has_value();
            check(is_held == is_there, "a resume point is there and cannot be had, or the reverse");
        }
        std::vector<std::uint32_t> lengths;
        for (const Candidate& candidate : found.candidates) {
            lengths.push_back(candidate.tokens);
        }
        check(lengths == expected, "a match differs from the model");
        std::uint32_t pending = 0;
        for (const Writer& writer : writers_) {
            const Ids& ids = writer.prompt.ids;
            if (writer.salt == salt && ids.size() <= cap && std::equal(ids.begin(), ids.end(), prompt.ids.begin())) {
                pending = std::max(pending, static_cast<std::uint32_t>(ids.size()));
            }
        }
        check(found.pending_tokens == (pending > (expected.empty() ? 0 : expected.front()) ? pending : 0),
              "what is pending differs from the model");
    }

    void hold() {
        const std::uint32_t salt = draw(2);
        Prompt prompt = draw_prompt(salt);
        auto held = index_.collect(prompt.path(), needs_[2], nullptr, nullptr);
        if (held && readers_.size() < 4) {
            index_.hold(*held);
            readers_.push_back({std::move(prompt), salt, std::move(*held)});
        }
    }

    void release() {
        if (!readers_.empty()) {
            const std::size_t number = draw(static_cast<std::uint32_t>(readers_.size()));
            check(index_.release(readers_[number].held).empty(), "a release freed something");
            readers_.erase(readers_.begin() + static_cast<std::ptrdiff_t>(number));
        }
    }

    bool is_held(const Place& place) const {
        const auto passes = [&](const Ids& ids, const Prompt& prompt) {
            const Path path = prompt.path();
            for (std::uint32_t node = 0; node < path.size(); ++node) {
                if (prompt.prefix(node) == ids) {
                    return true;
                }
            }
            return false;
        };
        for (const Writer& writer : writers_) {
            if (writer.salt == place.salt && passes(place.ids, writer.prompt)) {
                return true;
            }
        }
        for (const Reader& reader : readers_) {
            if (!reader.is_damaged && reader.salt == place.salt &&
                (place.group == 0 ? passes(place.ids, reader.prompt) : place.ids == reader.prompt.ids)) {
                return true;
            }
        }
        return false;
    }

    // Time to live: every place has the latest end of the commits that went through it.

    void live_on(const Place& place, Moment ends_at) {
        if (model_.contains(place)) {
            Moment& ends = ends_[place];  // of a new one 0
            ends = std::max(ends, ends_at);
        }
    }

    bool holds_records(const Place& place) const {
        return model_.contains({place.salt, place.ids, 0}) || model_.contains({place.salt, place.ids, 1});
    }

    void forget_ends() {
        std::erase_if(ends_, [&](const auto& each) { return !model_.contains(each.first); });
        std::erase_if(prompts_, [&](const auto& each) { return !holds_records(each.first); });
    }

    bool is_written(const Place& place) const {
        return std::any_of(writers_.begin(), writers_.end(), [&](const Writer& writer) {
            const Path path = writer.prompt.path();
            for (std::uint32_t node = 0; node < path.size(); ++node) {
                if (writer.salt == place.salt && writer.prompt.prefix(node) == place.ids) {
                    return true;
                }
            }
            return false;
        });
    }

    void expire() {
        now_ += draw(12);
        std::set<Place> expected;
        for (const auto& [place, ends_at] : ends_) {
            if (ends_at <= now_ && !(place.group == 0 && is_written(place))) {
                expected.insert(place);
            }
        }
        const bool is_due = index_.next_end() <= now_;
        check(expected.empty() || is_due, "what ends is not announced");
        for (Reader& reader : readers_) {
            const Path path = reader.prompt.path();
            for (std::uint32_t node = 0; node < path.size(); ++node) {
                reader.is_damaged = reader.is_damaged || expected.contains({reader.salt, reader.prompt.prefix(node), 0});
            }
            reader.is_damaged = reader.is_damaged || expected.contains({reader.salt, reader.prompt.ids, 1});
        }
        std::set<Place> before;
        for (const auto& [place, parts] : model_) {
            before.insert(place);
        }
        forget(index_.expire(now_), true);
        for (const Place& place : before) {
            check(model_.contains(place) != expected.contains(place), "something ended too early, or not at all");
        }
        check(index_.next_end() > now_ || !writers_.empty(), "what has ended is still announced");
        check(index_.take_expired().empty() == expected.empty(), "nobody is told what has ended");
        index_.take_lost_handovers();
        index_.take_events();
    }

    void set_end() {
        const std::uint32_t salt = draw(2);
        const Prompt prompt = draw_prompt(salt);
        const Path path = prompt.path();
        const Moment at = draw(3) == 0 ? lasting : now_ + draw(20);
        const std::uint32_t after_tokens = draw(2) == 0 ? none : draw(8);
        std::uint32_t deepest = path.size();
        while (deepest > 0 && !holds_records({salt, prompt.prefix(deepest - 1), 0})) {
            --deepest;
        }
        const std::uint32_t tokens = deepest == 0 ? 0 : path.end_tokens(deepest - 1);
        check(index_.set_end(path, at, after_tokens) == tokens, "another prefix was given an end");
        for (std::uint32_t node = deepest; node-- > 0;) {
            const Place place{salt, prompt.prefix(node), 0};
            if (node + 1 == deepest || path.end_tokens(node) > after_tokens) {
                if (model_.contains({salt, place.ids, 1})) {
                    ends_[{salt, place.ids, 1}] = at;
                }
                if (node + 1 == deepest || prompts_.contains(place)) {
                    prompts_[place] = at;
                }
            }
        }
        for (std::uint32_t node = deepest; node-- > 0;) {
            const Place place{salt, prompt.prefix(node), 0};
            if (!model_.contains(place)) {
                break;
            }
            Moment wanted = at;
            if (const auto found = prompts_.find(place); found != prompts_.end()) {
                wanted = std::max(wanted, found->second);
            }
            for (const auto& [other, ends_at] : ends_) {
                const bool is_below = other.salt == salt && other.ids.size() >= place.ids.size() &&
                                      std::equal(place.ids.begin(), place.ids.end(), other.ids.begin()) &&
                                      !(other.ids == place.ids && other.group == 0) &&
                                      (other.ids == place.ids || place.ids.size() % block_tokens == 0);
                wanted = is_below ? std::max(wanted, ends_at) : wanted;
            }
            ends_[place] = wanted;
        }
    }

    // These slots have gone: take them from the model.
    void forget(const std::vector<Slot>& slots, bool may_be_held = false) {
        std::set<std::uint64_t> gone;
        for (const Slot& slot : slots) {
            check(gone.insert(slot.index).second, "a slot was freed twice");
        }
        for (auto at = model_.begin(); at != model_.end();) {
            auto& [place, parts] = *at;
            const std::size_t before = parts.size();
            std::erase_if(parts, [&](const auto& part) { return gone.erase(part.second.index) != 0; });
            check(parts.size() == before || parts.empty(), "a node lost a part of what it had");
            check(may_be_held || parts.size() == before || !is_held(place), "what is held was evicted");
            at = parts.empty() ? model_.erase(at) : std::next(at);
        }
        check(gone.empty(), "a slot was freed that held nothing");
        forget_ends();
    }

    const Place* draw_place() {
        if (model_.empty()) {
            return nullptr;
        }
        return &std::next(model_.begin(), draw(static_cast<std::uint32_t>(model_.size())))->first;
    }

    NodeId node_of(const Place& place) const {
        const Prompt prompt(place.ids, place.salt);
        return index_.find(prompt.path().key(prompt.path().size() - 1));
    }

    // A place and, for attention, whatever lies below it.
    std::set<Place> below(const Place& place) const {
        std::set<Place> found;
        for (const auto& [other, parts] : model_) {
            const bool continues = other.salt == place.salt && other.ids.size() >= place.ids.size() &&
                                   std::equal(place.ids.begin(), place.ids.end(), other.ids.begin());
            const bool is_below = continues && (other.ids == place.ids || place.ids.size() % block_tokens == 0);
            if (place.group == 0 ? is_below : other == place) {
                found.insert(other);
            }
        }
        return found;
    }

    void evict() {
        if (const Place* drawn = draw_place()) {
            const Place place = *drawn;
            const std::set<Place> expected = below(place);
            const bool is_free = std::none_of(expected.begin(), expected.end(), [&](const Place& each) {
                return is_held(each);
            });
            const std::vector<Slot> slots = index_.evict(node_of(place), place.group == 1);
            const bool is_damaged = std::any_of(readers_.begin(), readers_.end(),
                                                [](const Reader& reader) { return reader.is_damaged; });
            check(is_damaged || slots.empty() != is_free || expected.empty(), "evicted what is held, or not what is not");
            forget(slots);
        }
    }

    void condemn() {
        if (const Place* drawn = draw_place()) {
            const Place place = *drawn;
            for (Reader& reader : readers_) {
                reader.is_damaged = true;  // perhaps: it is not asked about any more
            }
            const std::set<Place> expected = below(place);
            forget(index_.condemn(node_of(place), place.group == 1), true);
            for (const Place& each : expected) {
                check(!model_.contains(each), "what hung on damage is still there");
            }
        }
    }

    // What is told of changes is all that one must know to know what is there.
    void mirror() {
        if (!is_watched_) {
            check(index_.changes().empty(), "changes are noted that nobody asked for");
            return;
        }
        using Key = std::tuple<std::array<std::uint8_t, digest_bytes>, bool>;
        const auto key_of = [](const Change& change) { return Key{change.key.bytes, change.is_state}; };
        for (const Change& change : index_.changes()) {
            check(index_.salt_name(change.salt).empty() || index_.salt_name(change.salt) == "tenant", "a foreign salt");
            if (change.is_added) {
                mirrored_[key_of(change)] += change.size_bytes;
            } else {
                const auto known = mirrored_.find(key_of(change));
                check(known != mirrored_.end() && known->second == change.size_bytes, "something unknown was removed");
                mirrored_.erase(known);
            }
        }
        index_.drop_changes();
        std::map<Key, std::uint64_t> there;
        for (const Change& change : index_.contents()) {
            there[key_of(change)] = change.size_bytes;
        }
        check(mirrored_ == there, "the changes do not add up to what is there");
    }

    // What a policy outside would name: everything, in any order.
    std::vector<Handle> shuffled() {
        std::vector<Handle> handles;
        for (const auto& [place, parts] : model_) {
            const Prompt prompt(place.ids, place.salt);
            const Handle handle = index_.ranked_handle(prompt.path().key(prompt.path().size() - 1), place.group == 1);
            check(handle != none, "what is there is not ranked");
            handles.push_back(handle);
        }
        std::shuffle(handles.begin(), handles.end(), random_);
        return handles;
    }

    void push_all() {
        if (!keeps_order_) {
            index_.push_victims(shuffled());
        }
    }

    // A salt is over its quota: only what is its own goes, and its share shrinks by what was promised.
    void make_room_in_salt() {
        const std::uint32_t salt = draw(2);
        const std::string name = salt == 0 ? "" : "tenant";
        const std::uint64_t before = index_.share_of(name);
        const std::uint64_t target = draw(10) * (slot_bytes + Index::record_bytes);
        const std::uint64_t chosen = index_.node_share() != Index::node_bytes
                                         ? index_.choose_in(name, target)
                                         : index_.choose_in(name, shuffled(), target);
        const std::vector<Slot> slots = index_.chosen_slots(index_.chosen_count());
        std::uint64_t others = 0;
        for (const auto& [place, parts] : model_) {
            others += place.salt == salt ? 0 : parts.size();
        }
        if (chosen < target) {
            check(!writers_.empty() || !readers_.empty() || slots.size() + others == total(), "a victim was overlooked");
        }
        if (draw(4) == 0) {
            index_.drop_choice();
            check(index_.share_of(name) == before, "a choice changed something");
            return;
        }
        if (draw(2) == 0) {  // and then for the tier: from all
            push_all();
            index_.choose(draw(10) * (slot_bytes + Index::record_bytes));
            forget(index_.evict_chosen());
            check(index_.share_of(name) + chosen <= before, "a choice of one salt was forgotten");
        } else {
            forget(index_.evict_chosen());
            check(index_.share_of(name) + chosen == before, "the share of a salt did not shrink by what was promised");
            std::uint64_t left = 0;
            for (const auto& [place, parts] : model_) {
                left += place.salt == salt ? 0 : parts.size();
            }
            check(left == others, "another salt lost something");
        }
        index_.take_lost_handovers();
        index_.take_events();
    }

    void make_room() {
        push_all();
        const std::uint64_t target = draw(10) * (slot_bytes + Index::record_bytes);
        const std::uint64_t chosen = index_.choose(target);
        const std::vector<Slot> slots = index_.chosen_slots(index_.chosen_count());
        check(slots.size() * (slot_bytes + Index::record_bytes) == chosen, "the choice is miscounted");
        if (draw(3) == 0) {
            index_.drop_choice();
            return;
        }
        const std::size_t kept = index_.chosen_count() - (index_.chosen_count() != 0 ? draw(2) : 0);
        const std::size_t kept_slots = index_.chosen_slots(kept).size();
        index_.trim_choice(kept);
        const std::vector<Slot> freed = index_.evict_chosen();
        check(freed.size() == kept_slots, "not what was chosen was evicted");
        forget(freed);
        check(index_.take_lost_handovers().empty(), "there was no hand-over to lose");
        index_.take_events();
    }

    std::mt19937_64 random_;
    bool keeps_order_;
    bool is_watched_;
    Index index_;
    std::map<std::tuple<std::array<std::uint8_t, digest_bytes>, bool>, std::uint64_t> mirrored_;
    std::vector<Needs> needs_;
    std::map<Place, std::vector<std::pair<Units, Slot>>> model_;
    std::map<Place, Moment> ends_;
    std::map<Place, Moment> prompts_;  // that end at a node, by its attention's place
    Moment now_ = 1;
    std::vector<Writer> writers_;
    std::vector<Reader> readers_;
    std::uint64_t next_slot_ = 0;
};

void test_against_the_model() {
    for (std::uint64_t seed = 1; seed <= 60; ++seed) {
        Machine(seed, seed % 3 != 0).run(400);
    }
}

void test_table() {
    IdTable table;
    std::map<std::uint32_t, std::uint32_t> model;  // id to hash
    std::mt19937 random(5);
    for (std::uint32_t step = 0; step < 20000; ++step) {
        if (model.empty() || random() % 5 < 3) {
            // Few distinct high bits: long runs, also across the end of the table.
            const auto hash = static_cast<std::uint32_t>((random() % 3 == 0 ? 0xfffffff0U : 0x10000000U) + random() % 16);
            table.insert(hash, step);
            model[step] = hash;
        } else {
            const auto victim = std::next(model.begin(), static_cast<std::ptrdiff_t>(random() % model.size()));
            table.erase(victim->second, victim->first);
            model.erase(victim);
        }
        if (step % 500 == 0) {
            for (const auto& [id, hash] : model) {
                check(table.find(hash, [&, wanted = id](std::uint32_t found) { return found == wanted; }) == id, "lost");
            }
        }
        check(table.size() == model.size(), "the table miscounts");
        if (model.size() > 300) {
            table = {};
            model.clear();
        }
    }
}

// Digests that differ in one word only, as somebody would choose them, are spread all the same: no long searches.
void test_chosen_digests() {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
        const DigestHash hash(seed);
        for (std::size_t word = 0; word < 4; ++word) {
            for (const unsigned shift : {0U, 20U, 47U}) {
                std::set<std::uint32_t> distinct;
                constexpr std::uint64_t count = 1 << 16;
                for (std::uint64_t number = 0; number < count; ++number) {
                    Digest digest{};
                    const std::uint64_t value = number << shift;
                    std::memcpy(digest.bytes.data() + 8 * word, &value, sizeof value);
                    distinct.insert(static_cast<std::uint32_t>(hash(digest) >> 32));
                }
                check(distinct.size() > count - count / 100, "chosen digests fall onto each other");
            }
        }
    }
    const DigestHash one(1);
    const DigestHash other(2);
    check(one(Digest{}) != other(Digest{}), "the seed does not matter");
}

// More tails on one node than are compared one by one, and two of the same ids that extra inputs tell apart.
void test_many_tails() {
    Index index({true}, 0, true, 9);
    Needs needs;
    needs.groups.emplace_back(std::uint8_t{0}, true, std::uint16_t{1}, std::vector<std::uint16_t>{0});
    needs.states = true;
    const Digest root = digest_of(Digest{}, std::array{1U});
    std::uint64_t slot = 0;
    const auto write = [&](const Digest& key, const Ids& ids) {
        const Path path{root, 8, nullptr, 0, &key, ids};
        const Name name{0, 0, 0, {0, 1}, Digest{}};
        WriteSet set = index.plan(path, std::span(&name, 1), false);
        check(set.status == PlanStatus::ok && set.missing.size() == 1, "a tail cannot be written");
        index.enter(set, path, "", {}, {0});
        set.missing[0].slot = {slot++, 0, slot_bytes};
        check(index.commit(set, std::array{std::uint64_t{0}}, std::array{std::uint64_t{0}}, {}).empty(), "given back");
        index.leave(set);
        index.let_go(set);
    };
    for (std::uint32_t id = 0; id < 200; ++id) {
        const Ids ids{id, 7};
        write(digest_of(root, ids), ids);
    }
    const Ids twin{5, 7};
    const Digest other = digest_of(root, std::array{5U, 7U, 99U});
    write(other, twin);
    for (std::uint32_t id = 0; id < 210; ++id) {
        const Ids ids{id, 7, 1, 2};
        const Found found = index.match({{root, 8, nullptr, 0, nullptr, {}}, ids, 3, &needs, nullptr, 64, {}});
        check(found.tails.size() == (id == 5 ? 2U : id < 200 ? 1U : 0U), "the wrong tails were found");
        if (id == 5) {
            const std::array excluded{found.tails[0].tail, found.tails[1].tail};
            check(index.match({{root, 8, nullptr, 0, nullptr, {}}, ids, 3, &needs, nullptr, 64, excluded}).tails.empty(),
                  "what was excluded was found again");
        }
    }
    check(index.match({{root, 8, nullptr, 0, nullptr, {}}, twin, 1, &needs, nullptr, 64, {}}).candidates.empty(),
          "a tail past the cap was found");
    check(index.check().empty(), "the index is damaged");
}

// Victims that are pushed before the last ones are used up, again and again: what was taken does not pile up.
void test_pushed_victims_do_not_pile_up() {
    Index index({false}, 0, false, 3);
    const Prompt prompt({1, 2, 3, 4, 5, 6, 7, 8}, 0);
    std::vector<Name> names;
    for (std::uint32_t node = 0; node < prompt.path().size(); ++node) {
        names.push_back({node, 0, 0, {0, 1}, Digest{}});
    }
    WriteSet set = index.plan(prompt.path(), names, false);
    index.enter(set, prompt.path(), "", {}, {});
    index.commit(set, std::array<std::uint64_t, 4>{0, 1, 2, 3}, std::array<std::uint64_t, 4>{}, {});
    index.leave(set);
    index.let_go(set);
    std::vector<Handle> ranked;
    for (auto key = prompt.keys.rbegin(); key != prompt.keys.rend(); ++key) {
        ranked.push_back(index.ranked_handle(*key, false));
    }
    const std::size_t before = index.allocated_bytes();
    for (int round = 0; round < 10000; ++round) {
        index.push_victims(ranked);
        index.choose(1);
        check(index.chosen_count() == 1, "there is no victim");
        index.drop_choice();
        check(index.pushed_count() < ranked.size(), "a victim was pushed twice");
    }
    check(index.allocated_bytes() < before + 1024, "pushed victims pile up");
}

}  // namespace

int main() {
    test_table();
    test_chosen_digests();
    test_many_tails();
    test_pushed_victims_do_not_pile_up();
    test_against_the_model();
}
