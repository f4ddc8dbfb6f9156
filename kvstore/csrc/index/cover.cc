// Which records of a node hold the units that somebody needs.
#include "index.h"

namespace kvstore::index {

RecordId Index::first_of(NodeId id, std::uint32_t place) const {
    RecordId at = nodes_[id].first_record;
    while (at != none && records_[at].place() < place) {
        at = records_[at].next;
    }
    return at;
}

// Records in their order that together hold the needed units of one span. `at` moves past the span.
bool Index::cover_span(RecordId& at, const GroupNeed& need, std::uint16_t span, GridId grid, bool accepts_lossy,
                       std::vector<RecordId>* chosen) const {
    const std::uint32_t place = (std::uint32_t{need.group} << 16) | span;
    while (at != none && records_[at].place() < place) {
        at = records_[at].next;
    }
    bool is_covered = false;
    std::size_t left = need.units.size();
    for (; at != none && records_[at].place() == place; at = records_[at].next) {
        const Record& record = records_[at];
        if (is_covered || (grid != any_grid && record.grid != grid) || (record.is_lossy && !accepts_lossy)) {
            continue;
        }
        std::size_t taken = left;
        const bool is_first = left == need.units.size();
        if (!is_first || !record.units.covers(need.range)) {
            if (is_first) {
                lacking_.assign(need.range.stop / 64U + 1U, 0);
                for (const std::uint16_t unit : need.units) {
                    lacking_[unit / 64U] |= std::uint64_t{1} << (unit % 64U);
                }
            }
            taken = 0;
            for (const std::uint16_t unit : need.units) {
                const std::uint64_t bit = std::uint64_t{1} << (unit % 64U);
                if (record.units.start <= unit && unit < record.units.stop && (lacking_[unit / 64U] & bit) != 0) {
                    lacking_[unit / 64U] &= ~bit;
                    ++taken;
                }
            }
        }
        if (taken != 0 && chosen != nullptr) {
            chosen->push_back(at);
        }
        left -= taken;
        is_covered = left == 0;
    }
    return is_covered;
}

bool Index::covers(NodeId id, const GroupNeed& need, GridId grid, bool accepts_lossy) const {
    RecordId at = nodes_[id].first_record;
    for (std::uint16_t span = 0; span < need.spans; ++span) {
        if (!cover_span(at, need, span, grid, accepts_lossy, nullptr)) {
            return false;
        }
    }
    return true;
}

bool Index::has_all(NodeId id, const Needs& needs, bool states, GridId grid) const {
    for (const GroupNeed& need : needs.groups) {
        if (need.is_state == states && !covers(id, need, grid, needs.accepts_lossy)) {
            return false;
        }
    }
    return true;
}

bool Index::find_records(NodeId id, std::uint32_t group, std::uint32_t span, Units units, GridId grid,
                         bool accepts_lossy, std::vector<RecordId>* found) const {
    const std::uint32_t place = (group << 16) | span;
    const std::size_t begin = found != nullptr ? found->size() : 0;
    std::size_t left = units.stop - units.start;
    lacking_.assign(units.stop / 64U + 1U, ~std::uint64_t{0});
    for (RecordId at = first_of(id, place); at != none && records_[at].place() == place; at = records_[at].next) {
        const Record& record = records_[at];
        if ((grid != any_grid && record.grid != grid) || (record.is_lossy && !accepts_lossy)) {
            continue;
        }
        if (record.units.covers(units)) {
            if (found != nullptr) {
                found->resize(begin);
                found->push_back(at);
            }
            return true;
        }
        std::size_t taken = 0;
        for (unsigned unit = std::max(units.start, record.units.start);
             unit < std::min(units.stop, record.units.stop); ++unit) {
            const std::uint64_t bit = std::uint64_t{1} << (unit % 64U);
            taken += (lacking_[unit / 64U] & bit) != 0;
            lacking_[unit / 64U] &= ~bit;
        }
        if (taken != 0 && found != nullptr) {
            found->push_back(at);
        }
        left -= taken;
    }
    if (left != 0 && found != nullptr) {
        found->resize(begin);
    }
    return left == 0;
}

Row Index::row_of(RecordId id, std::uint32_t node) const {
    const Record& record = records_[id];
    return {node, record.group, record.span, record.units, record.slot(), grids_.digest(record.grid), record.cost_us};
}

}  // namespace kvstore::index
