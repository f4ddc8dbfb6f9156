#include "copy/copy_rows.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "copy/shares.h"

namespace kvstore {
namespace {

using testing::check;
using testing::throws;

std::uint64_t address(const void* pointer) {
    return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

// Bytes that a strided region covers, so that buffers can end exactly with it and the address sanitizer sees more.
std::size_t extent(std::size_t rows, std::size_t row_bytes, std::size_t stride) {
    return rows == 0 ? 0 : (rows - 1) * stride + row_bytes;
}

struct NamedKernels {
    std::string name;
    CopyKernels kernels;
};

// Every pair of a copy path and a checksum path.
std::vector<NamedKernels> kernels_of_this_cpu() {
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
void fill(unsigned char* data, std::size_t size_bytes, std::mt19937_64& random) {
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

std::vector<std::unique_ptr<Case>> random_cases(std::mt19937_64& random) {
    std::vector<std::unique_ptr<Case>> cases(1 + random() % 12);
    const std::size_t row_bytes_max = std::vector<std::size_t>{20, 400, 5000, 30000}[random() % 4];
    for (auto& one : cases) {
        one = std::make_unique<Case>(random, row_bytes_max);
    }
    return cases;
}

void random_plans(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
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
void random_checksums(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
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

void checksums_in_place(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
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
void large_entries(const NamedKernels& named, const CopyOptions& options, const std::string& where) {
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

void bad_plans() {
    constexpr std::uint64_t huge = std::numeric_limits<std::uint64_t>::max();
    const auto refused = [](const RowCopy& copy, const std::string& part) {
        const std::vector<RowCopy> plan{{64, 4096, 1, 64, 64, 64}, copy};
        const std::vector<PieceCopy> pieces{{{64, 4096, 1, 64, 64, 64}, 0}, {copy, 64}};
        return throws<std::invalid_argument>([&] { check_plan(plan); }, "copy_rows: entry 1 of the plan " + part) &&
               throws<std::invalid_argument>([&] { check_plan(pieces); },
                                             "copy_rows_crc32c: entry 1 of the plan " + part);
    };
    check(refused({0, 64, 1, 8, 8, 8}, "has a null destination"), "null destination");
    check(refused({64, 0, 1, 8, 8, 8}, "has a null source"), "null source");
    check(refused({64, 4096, 2, 8, 7, 8}, "has a stride smaller"), "small destination stride");
    check(refused({64, 4096, 2, 8, 8, 0}, "has a stride smaller"), "small source stride");
    check(refused({64, 4096, 3, 8, huge, 8}, "runs past the end"), "stride times rows overflows");
    check(refused({64, huge - 3, 1, 8, 8, 8}, "runs past the end"), "row overflows");
    check(refused({64, 71, 1, 8, 8, 8}, "has overlapping"), "overlap by one byte");
    check(refused({4000, 4096, 10, 8, 16, 8}, "has overlapping"), "overlap within the stride");
    check_plan(std::vector<RowCopy>{{64, 72, 1, 8, 0, 0}, {0, 0, 0, 8, 8, 8}, {0, 0, 8, 0, 0, 0}});

    const std::vector<PieceCopy> past_the_end{{{64, 4096, 1, 64, 64, 64}, huge - 2}};
    check(throws<std::invalid_argument>([&] { check_plan(past_the_end); }, "place for its checksum"), "checksum's place");
    const auto refused_in_place = [](const PieceInPlace& piece, const std::string& part) {
        return throws<std::invalid_argument>([&] { check_plan(std::vector<PieceInPlace>{piece}); }, part);
    };
    check(refused_in_place({0, 8, 64}, "is null"), "null piece");
    check(refused_in_place({huge - 3, 8, 64}, "past the end"), "piece past the end");
    check(refused_in_place({64, 8, 0}, "has no place"), "no place for the checksum");
    check_plan(std::vector<PieceInPlace>{{0, 0, 64}});
}

void choice_of_path() {
    const CpuFeatures none{"x86_64"};
    const CpuFeatures old{.architecture = "x86_64", .avx2 = true};
    const CpuFeatures other{"aarch64"};
    check(choose_copy_path(old, std::nullopt).name == "avx2", "AVX2 is used");
    check(choose_copy_path(old, std::nullopt).why_not_better == "this CPU has no AVX-512F", "reason: AVX-512F");
    check(choose_copy_path(none, std::nullopt).name == "portable", "plain x86-64 uses memcpy");
    check(choose_copy_path(other, std::nullopt).name == "portable", "other architectures use memcpy");
    check(choose_copy_path(old, "portable").why_not_better == "KVSTORE_COPY=portable forces it", "a forced path");
    check(throws<std::runtime_error>([&] { choose_copy_path(old, "avx512"); }, "KVSTORE_COPY=avx512 cannot be used"),
          "a forced path that the CPU cannot run is refused");
    check(throws<std::runtime_error>([&] { choose_copy_path(other, "avx2"); }, "needs x86_64"),
          "a forced path of another architecture is refused");
    check(throws<std::runtime_error>([&] { choose_copy_path(old, "sse"); }, "names no copy path"),
          "an unknown path is refused");
}

void shares_are_taken_once() {
    for (const unsigned threads : {1u, 2u, 5u, 40u}) {
        std::vector<int> taken(1000, 0);
        run_shares(taken.size(), threads, [&](std::size_t share) { ++taken[share]; });
        check(std::all_of(taken.begin(), taken.end(), [](int count) { return count == 1; }), "each share once");
    }
    run_shares(0, 4, [](std::size_t) { check(false, "there is no share to take"); });
}

// Callers in parallel, more threads asked for than there may be.
void callers_in_parallel(const NamedKernels& named) {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&named, caller] {
            const CopyOptions options{named.kernels, 7, caller % 2 == 0};
            large_entries(named, options, " in parallel");
            random_checksums(named, options, " in parallel");
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::bad_plans();
    kvstore::choice_of_path();
    kvstore::shares_are_taken_once();
    for (const auto& named : kvstore::kernels_of_this_cpu()) {
        for (const bool streams : {false, true}) {
            for (const unsigned threads : {1u, 2u, 3u}) {
                const kvstore::CopyOptions options{named.kernels, threads, streams};
                const std::string where =
                    std::string(streams ? ", streaming" : "") + ", threads " + std::to_string(threads);
                kvstore::random_plans(named, options, where);
                kvstore::random_checksums(named, options, where);
                kvstore::checksums_in_place(named, options, where);
                kvstore::large_entries(named, options, where);
            }
        }
        kvstore::callers_in_parallel(named);
        std::cout << named.name << ": passed\n";
    }
}
