// Random plans with their memory, and what every pair of paths must do with them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "copy/copy_rows.h"

namespace kvstore::testing {

inline std::uint64_t address(const void* pointer) {
    return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

// Bytes that a strided region covers, so that buffers can end exactly with it and the address sanitizer sees more.
inline std::size_t extent(std::size_t rows, std::size_t row_bytes, std::size_t stride) {
    return rows == 0 ? 0 : (rows - 1) * stride + row_bytes;
}

struct NamedKernels {
    std::string name;
    CopyKernels kernels;
};

// Every pair of a copy path and a checksum path.
inline std::vector<NamedKernels> kernels_of_this_cpu() {
    const CpuFeatures cpu = detect_cpu_features();
    std::vector<NamedKernels> all;
    for (const char* copy_name : {"portable", "avx2", "avx512"}) {
        for (const char* checksum_name : {"portable", "sse42", "avx512"}) {
            const std::string name = std::string("copy ") + copy_name + ", crc32c " + checksum_name;
            try {
                all.push_back(
                    {name, CopyKernels(choose_copy_path(cpu, copy_name), choose_crc32c_path(cpu, checksum_name))});
            } catch (const std::runtime_error& error) {
                std::cout << name << ": skipped, " << error.what() << "\n";
            }
        }
    }
    return all;
}

// One number drawn per word: drawing each byte would take most of the test's time.
inline void fill(unsigned char* data, std::size_t size_bytes, std::mt19937_64& random) {
    for (std::size_t at = 0; at < size_bytes; at += sizeof(std::uint64_t)) {
        const std::uint64_t word = random();
        std::memcpy(data + at, &word, std::min(sizeof word, size_bytes - at));
    }
}

// One entry with its own memory, which ends with it.
class Case {
  public:
    Case(std::mt19937_64& random, std::size_t row_bytes_max)
        : rows_(random() % 40),
          row_bytes_(random() % row_bytes_max),
          destination_stride_(row_bytes_ + (random() % 2 == 0 ? 0 : random() % 100)),
          source_stride_(row_bytes_ + (random() % 2 == 0 ? 0 : random() % 100)),
          destination_skip_(random() % 64),
          source_skip_(random() % 64),
          destination_size_(destination_skip_ + extent(rows_, row_bytes_, destination_stride_)),
          source_size_(source_skip_ + extent(rows_, row_bytes_, source_stride_)),
          destination_(std::make_unique<unsigned char[]>(destination_size_)),
          source_(std::make_unique<unsigned char[]>(source_size_)) {
        fill(source_.get(), source_size_, random);
        fill(destination_.get(), destination_size_, random);
        expected_.assign(destination_.get(), destination_.get() + destination_size_);
        for (std::size_t row = 0; row < rows_; ++row) {
            const unsigned char* bytes = source_.get() + source_skip_ + row * source_stride_;
            std::copy_n(bytes, row_bytes_, expected_.data() + destination_skip_ + row * destination_stride_);
            in_order_.insert(in_order_.end(), bytes, bytes + row_bytes_);
        }
    }

    RowCopy entry() const {
        return {address(destination_.get() + destination_skip_),
                address(source_.get() + source_skip_),
                rows_,
                row_bytes_,
                destination_stride_,
                source_stride_};
    }
    bool is_copied() const { return std::equal(expected_.begin(), expected_.end(), destination_.get()); }
    const std::vector<unsigned char>& in_order() const { return in_order_; }

  private:
    std::size_t rows_, row_bytes_, destination_stride_, source_stride_, destination_skip_, source_skip_;
    std::size_t destination_size_, source_size_;
    std::unique_ptr<unsigned char[]> destination_, source_;
    std::vector<unsigned char> expected_, in_order_;
};

inline std::vector<std::unique_ptr<Case>> random_cases(std::mt19937_64& random) {
    std::vector<std::unique_ptr<Case>> cases(1 + random() % 12);
    const std::size_t row_bytes_max = std::vector<std::size_t>{20, 400, 5000, 30000}[random() % 4];
    for (auto& one : cases) {
        one = std::make_unique<Case>(random, row_bytes_max);
    }
    return cases;
}

inline void random_plans(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
    std::mt19937_64 random(6);
    for (int round = 0; round < 12; ++round) {
        const auto cases = random_cases(random);
        std::vector<RowCopy> plan;
        for (const auto& one : cases) {
            plan.push_back(one->entry());
        }
        check_plan(plan);
        copy_rows(plan, options);
        check(std::all_of(cases.begin(), cases.end(), [](const auto& one) { return one->is_copied(); }),
              named.name + where + ", round " + std::to_string(round));
    }
}

// Some entries have no checksum, some are pieces of their own, some continue the piece before them.
inline void random_checksums(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
    std::mt19937_64 random(7);
    for (int round = 0; round < 12; ++round) {
        const auto cases = random_cases(random);
        constexpr std::size_t none = static_cast<std::size_t>(-1);
        std::vector<std::size_t> piece_of(cases.size(), none);
        std::vector<std::vector<unsigned char>> pieces;
        for (std::size_t i = 0; i < cases.size(); ++i) {
            const auto choice = random() % 4;
            if (choice == 0) {
                continue;
            }
            const bool continues = choice == 1 && i > 0 && piece_of[i - 1] != none;
            if (!continues) {
                pieces.emplace_back();
            }
            piece_of[i] = pieces.size() - 1;
            pieces.back().insert(pieces.back().end(), cases[i]->in_order().begin(), cases[i]->in_order().end());
        }
        // At odd addresses.
        std::vector<unsigned char> found(1 + pieces.size() * sizeof(std::uint32_t), 0xA5);
        std::vector<unsigned char> expected{0xA5};
        for (const auto& piece : pieces) {
            const std::uint32_t value = crc32c_portable(piece.data(), piece.size(), 0);
            const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
            expected.insert(expected.end(), bytes, bytes + sizeof value);
        }
        std::vector<PieceCopy> plan;
        for (std::size_t i = 0; i < cases.size(); ++i) {
            const std::uint64_t place =
                piece_of[i] == none ? 0 : address(found.data() + 1 + piece_of[i] * sizeof(std::uint32_t));
            plan.push_back({cases[i]->entry(), place});
        }
        check_plan(plan);
        copy_rows_crc32c(plan, options);
        const std::string label = named.name + where + ", round " + std::to_string(round);
        check(std::all_of(cases.begin(), cases.end(), [](const auto& one) { return one->is_copied(); }), label);
        check(found == expected, label + ": checksums");
    }
}

inline void checksums_in_place(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
    std::mt19937_64 random(8);
    std::vector<unsigned char> data(300000);
    fill(data.data(), data.size(), random);
    std::vector<PieceInPlace> plan;
    std::vector<std::uint32_t> found(30), expected;
    for (std::size_t i = 0; i < found.size(); ++i) {
        const std::size_t begin = random() % data.size();
        const std::size_t size = i == 0 ? 0 : random() % (data.size() - begin);
        plan.push_back({address(data.data() + begin), size, address(&found[i])});
        expected.push_back(crc32c_portable(data.data() + begin, size, 0));
    }
    check_plan(plan);
    crc32c_in_place(plan, options);
    check(found == expected, named.name + where + ": in place");
}

// One entry that is larger than a share is cut for several threads, rows and dense ranges alike.
inline void large_entries(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
    std::mt19937_64 random(9);
    const std::size_t size = 5 << 20;
    std::vector<unsigned char> source(size);
    fill(source.data(), size, random);
    for (const std::size_t row_bytes : {size, std::size_t{65536}, std::size_t{4096}, std::size_t{100}}) {
        std::vector<unsigned char> destination(size);
        const std::size_t rows = size / row_bytes;
        copy_rows(std::vector<RowCopy>{{address(destination.data()), address(source.data()), rows, row_bytes, row_bytes,
                                        row_bytes}},
                  options);
        check(std::equal(source.begin(), source.begin() + static_cast<std::ptrdiff_t>(rows * row_bytes),
                         destination.begin()),
              named.name + where + ": dense");
    }
    std::vector<unsigned char> spread(2 * size);
    copy_rows(std::vector<RowCopy>{{address(spread.data()), address(source.data()), size / 8192, 8192, 16384, 8192}},
              options);
    for (std::size_t row = 0; row < size / 8192; ++row) {
        check(std::equal(source.begin() + static_cast<std::ptrdiff_t>(row * 8192),
                         source.begin() + static_cast<std::ptrdiff_t>((row + 1) * 8192),
                         spread.begin() + static_cast<std::ptrdiff_t>(row * 16384)),
              named.name + where + ": spread");
    }
}

}  // namespace kvstore::testing
