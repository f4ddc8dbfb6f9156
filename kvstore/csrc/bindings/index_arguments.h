// How the index's arguments and answers cross into Python: packed paths and grids, tables of names, rows and slots.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../index/index.h"
#include "array.h"

namespace kvstore::bindings {

namespace nb = nanobind;
using namespace kvstore::index;

using Table = nb::ndarray<nb::numpy, std::uint64_t>;
using TokenIds = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr std::size_t row_columns = 10;
constexpr std::size_t name_columns = 6;
constexpr std::size_t place_columns = 4;
constexpr std::size_t change_columns = 5;  // added, states, end tokens, bytes, salt

inline Table make_table(std::vector<std::uint64_t>&& values, std::size_t columns) {
    auto kept = std::make_unique<std::vector<std::uint64_t>>(std::move(values));
    std::uint64_t* const data = kept->data();
    const std::size_t rows = kept->size() / columns;
    const nb::capsule owner(kept.get(), [](void* memory) noexcept {
        delete static_cast<std::vector<std::uint64_t>*>(memory);
    });
    kept.release();
    return Table(data, {rows, columns}, owner);
}

inline Table slot_table(const std::vector<Slot>& slots) {
    std::vector<std::uint64_t> values;
    values.reserve(slots.size() * 3);
    for (const Slot& slot : slots) {
        values.insert(values.end(), {slot.index, slot.generation, slot.size_bytes});
    }
    return make_table(std::move(values), 3);
}

inline std::size_t size_of(const nb::bytes& bytes) { return bytes.size(); }

inline const Digest* digests_of(const nb::bytes& bytes, const char* name) {
    if (size_of(bytes) % digest_bytes != 0) {
        throw std::invalid_argument(std::string(name) + " must be whole digests of 32 bytes");
    }
    return reinterpret_cast<const Digest*>(bytes.c_str());
}

inline const Digest& digest_of(const nb::bytes& bytes, const char* name) {
    if (size_of(bytes) != digest_bytes) {
        throw std::invalid_argument(std::string(name) + " must be one digest of 32 bytes");
    }
    return *reinterpret_cast<const Digest*>(bytes.c_str());
}

inline std::vector<std::uint32_t> numbers_of(const nb::bytes& bytes) {
    std::vector<std::uint32_t> numbers(size_of(bytes) / sizeof(std::uint32_t));
    std::memcpy(numbers.data(), bytes.c_str(), numbers.size() * sizeof(std::uint32_t));
    return numbers;
}

// (root, block_tokens, keys, tail key or None, tail ids): see `NodePath.packed`.
class PackedPath {
  public:
    explicit PackedPath(const nb::tuple& packed) {
        if (packed.size() != 5) {
            throw std::invalid_argument("a packed path has five parts");
        }
        const auto root = nb::cast<nb::bytes>(packed[0]);
        const auto keys = nb::cast<nb::bytes>(packed[2]);
        path_.root = digest_of(root, "the root");
        path_.block_tokens = nb::cast<std::uint32_t>(packed[1]);
        path_.keys = digests_of(keys, "the keys");
        path_.blocks = static_cast<std::uint32_t>(size_of(keys) / digest_bytes);
        path_.tail_key = nullptr;
        if (!packed[3].is_none()) {
            tail_key_ = digest_of(nb::cast<nb::bytes>(packed[3]), "the tail's key");
            tail_ids_ = numbers_of(nb::cast<nb::bytes>(packed[4]));
            path_.tail_key = &tail_key_;
            path_.tail_ids = tail_ids_;
        }
        if (path_.block_tokens == 0 || (path_.tail_key != nullptr && tail_ids_.empty())) {
            throw std::invalid_argument("a block and a tail have at least one token");
        }
    }
    PackedPath(const PackedPath&) = delete;
    PackedPath& operator=(const PackedPath&) = delete;

    const Path& operator*() const { return path_; }

  private:
    Path path_{};
    Digest tail_key_{};
    std::vector<std::uint32_t> tail_ids_;
};

// (boundaries, digests) or None: see `ChunkGrid.packed`.
class PackedGrid {
  public:
    explicit PackedGrid(const std::optional<nb::tuple>& packed) {
        if (!packed) {
            return;
        }
        boundaries_ = numbers_of(nb::cast<nb::bytes>((*packed)[0]));
        digests_ = nb::cast<nb::bytes>((*packed)[1]);
        if (size_of(digests_) != (boundaries_.size() + 1) * digest_bytes) {
            throw std::invalid_argument("a grid has a digest at 0 and at each boundary");
        }
        grid_ = Grid{boundaries_, digests_of(digests_, "the digests")};
    }
    PackedGrid(const PackedGrid&) = delete;
    PackedGrid& operator=(const PackedGrid&) = delete;

    const Grid* get() const { return grid_ ? &*grid_ : nullptr; }

  private:
    std::vector<std::uint32_t> boundaries_;
    nb::bytes digests_;
    std::optional<Grid> grid_;
};

template <typename Narrow>
Narrow narrow(std::uint64_t value, const char* name) {
    if (value > std::numeric_limits<Narrow>::max()) {
        throw std::invalid_argument(std::string(name) + " " + std::to_string(value) + " is too large");
    }
    return static_cast<Narrow>(value);
}

inline std::vector<Name> names_of(const Path& path, const AnyArray& table, const nb::bytes& digest_list,
                           std::size_t group_count) {
    const auto values = uint64_values(table, name_columns, "names");
    const Digest* digests = digests_of(digest_list, "the digests");
    const std::size_t digest_count = size_of(digest_list) / digest_bytes;
    std::vector<Name> names;
    names.reserve(values.size() / name_columns);
    for (std::size_t at = 0; at < values.size(); at += name_columns) {
        const auto row = values.subspan(at, name_columns);
        if (row[0] >= path.size() || row[1] >= group_count || row[3] >= row[4] || row[5] >= digest_count) {
            throw std::out_of_range("a record's name is not of this path, group, units and digests");
        }
        names.push_back({static_cast<std::uint32_t>(row[0]), static_cast<std::uint16_t>(row[1]),
                         narrow<std::uint16_t>(row[2], "span"),
                         {narrow<std::uint16_t>(row[3], "unit"), narrow<std::uint16_t>(row[4], "unit")},
                         digests[row[5]]});
    }
    return names;
}

// A table of ROW_COLUMNS, and the digests that its last column numbers.
inline nb::tuple rows_to_python(const std::vector<Row>& rows) {
    struct Less {
        bool operator()(const Digest& left, const Digest& right) const { return left.bytes < right.bytes; }
    };
    std::map<Digest, std::uint64_t, Less> numbers;
    std::string digests;
    std::vector<std::uint64_t> values;
    values.reserve(rows.size() * row_columns);
    const Digest* last = nullptr;
    std::uint64_t last_number = 0;
    for (const Row& row : rows) {
        if (last == nullptr || !(*last == row.grid)) {
            const auto [found, is_new] = numbers.emplace(row.grid, numbers.size());
            if (is_new) {
                digests.append(reinterpret_cast<const char*>(row.grid.bytes.data()), digest_bytes);
            }
            last = &row.grid;
            last_number = found->second;
        }
        values.insert(values.end(), {row.node, row.group, row.span, row.units.start, row.units.stop, row.slot.index,
                                     row.slot.generation, row.slot.size_bytes, row.cost_us, last_number});
    }
    return nb::make_tuple(make_table(std::move(values), row_columns), nb::bytes(digests.data(), digests.size()));
}

inline nb::bytes flag_bytes(const std::vector<bool>& flags) {
    const std::string bytes(flags.begin(), flags.end());
    return nb::bytes(bytes.data(), bytes.size());
}

// Nodes as `restore` takes them and `survey` gives them: keys, parents, numbers [n, 4] (end_tokens, number of the root,
// first of the tail's ids, how many there are), ids of all tails as 32-bit integers, roots with their salts.
class PackedNodes {
    static constexpr std::size_t columns = 4;

  public:
    explicit PackedNodes(const nb::tuple& packed) {
        if (packed.size() != 5) {
            throw std::invalid_argument("packed nodes have five parts");
        }
        keys_ = nb::cast<nb::bytes>(packed[0]);
        parents_ = nb::cast<nb::bytes>(packed[1]);
        const auto numbers_array = nb::cast<AnyArray>(packed[2]);
        const auto numbers = uint64_values(numbers_array, columns, "the numbers of nodes");
        tail_ids_ = numbers_of(nb::cast<nb::bytes>(packed[3]));
        for (const nb::handle each : nb::cast<nb::list>(packed[4])) {
            const auto root = nb::cast<nb::tuple>(each);
            const auto salt = nb::cast<nb::bytes>(root[1]);
            roots_.push_back({digest_of(nb::cast<nb::bytes>(root[0]), "a root"), std::string(salt.c_str(), salt.size())});
        }
        const Digest* keys = digests_of(keys_, "the keys");
        const Digest* parents = digests_of(parents_, "the parents");
        const std::size_t count = size_of(keys_) / digest_bytes;
        if (size_of(parents_) != size_of(keys_) || numbers.size() != count * columns || count >= none) {
            throw std::invalid_argument("each node has a key, a parent and numbers");
        }
        nodes_.reserve(count);
        for (std::size_t number = 0; number < count; ++number) {
            const auto row = numbers.subspan(number * columns, columns);
            if (row[1] >= roots_.size() || row[2] > tail_ids_.size() || row[3] > tail_ids_.size() - row[2]) {
                throw std::out_of_range("a node names a root or ids of a tail that are not there");
            }
            nodes_.push_back({keys + number, parents + number, narrow<std::uint32_t>(row[0], "length"),
                              static_cast<std::uint32_t>(row[1]), std::span(tail_ids_).subspan(row[2], row[3])});
        }
    }
    PackedNodes(const PackedNodes&) = delete;
    PackedNodes& operator=(const PackedNodes&) = delete;

    std::size_t size() const { return nodes_.size(); }
    std::span<const KeptNode> nodes() const { return nodes_; }
    std::span<const KeptRoot> roots() const { return roots_; }

  private:
    nb::bytes keys_;
    nb::bytes parents_;
    std::vector<std::uint32_t> tail_ids_;
    std::vector<KeptRoot> roots_;
    std::vector<KeptNode> nodes_;
};

// Records of the form that `rows_to_python` gives, whose first column counts `node_count` nodes.
inline std::vector<Row> rows_of(std::size_t node_count, const AnyArray& table, const nb::bytes& digest_list,
                                std::size_t group_count) {
    const auto values = uint64_values(table, row_columns, "records");
    const Digest* digests = digests_of(digest_list, "the digests");
    const std::size_t digest_count = size_of(digest_list) / digest_bytes;
    std::vector<Row> rows;
    rows.reserve(values.size() / row_columns);
    for (std::size_t at = 0; at < values.size(); at += row_columns) {
        const auto row = values.subspan(at, row_columns);
        if (row[0] >= node_count || row[1] >= group_count || row[3] >= row[4] || row[9] >= digest_count) {
            throw std::out_of_range("a record is not of these nodes, groups, units and digests");
        }
        rows.push_back({static_cast<std::uint32_t>(row[0]), static_cast<std::uint16_t>(row[1]),
                        narrow<std::uint16_t>(row[2], "span"),
                        {narrow<std::uint16_t>(row[3], "unit"), narrow<std::uint16_t>(row[4], "unit")},
                        {row[5], row[6], narrow<std::uint32_t>(row[7], "slot of bytes")},
                        digests[row[9]],
                        row[8]});
    }
    return rows;
}

inline nb::tuple nodes_to_python(const Index& index, const std::vector<NodeId>& ids) {
    const Nodes& nodes = index.nodes();
    std::string keys;
    std::string parents;
    std::string tail_ids;
    std::vector<std::uint64_t> numbers;
    std::map<NodeId, std::uint64_t> root_numbers;
    nb::list roots;
    keys.reserve(ids.size() * digest_bytes);
    parents.reserve(ids.size() * digest_bytes);
    numbers.reserve(ids.size() * 4);
    const auto append = [](std::string& to, const Digest& digest) {
        to.append(reinterpret_cast<const char*>(digest.bytes.data()), digest_bytes);
    };
    std::uint64_t tail_count = 0;
    for (const NodeId id : ids) {
        append(keys, nodes.key(id));
        append(parents, nodes.key(nodes.parent(id)));
        const NodeId root = nodes[id].root;
        const auto [found, is_new] = root_numbers.emplace(root, root_numbers.size());
        if (is_new) {
            const std::string& salt = index.salt(id);
            roots.append(nb::make_tuple(nb::bytes(nodes.key(root).bytes.data(), digest_bytes),
                                        nb::bytes(salt.data(), salt.size())));
        }
        std::span<const std::uint32_t> ids_of_tail;
        if (nodes.has(id, is_tail)) {
            ids_of_tail = nodes.tail_ids(id);
            tail_ids.append(reinterpret_cast<const char*>(ids_of_tail.data()), ids_of_tail.size_bytes());
        }
        numbers.insert(numbers.end(), {nodes[id].end_tokens, found->second, tail_count, ids_of_tail.size()});
        tail_count += ids_of_tail.size();
    }
    return nb::make_tuple(nb::bytes(keys.data(), keys.size()), nb::bytes(parents.data(), parents.size()),
                          make_table(std::move(numbers), 4), nb::bytes(tail_ids.data(), tail_ids.size()), roots);
}

inline nb::bytes key_bytes(const Digest& key) { return nb::bytes(key.bytes.data(), digest_bytes); }

}  // namespace kvstore::bindings
