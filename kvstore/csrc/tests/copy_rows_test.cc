#include <limits>

#include "copy_cases.h"

namespace kvstore {
namespace {

using testing::check;
using testing::throws;

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

}  // namespace
}  // namespace kvstore

int main() {
    using namespace kvstore;
    bad_plans();
    choice_of_path();
    for (const auto& named : testing::kernels_of_this_cpu()) {
        for (const bool streams : {false, true}) {
            for (const unsigned threads : {1u, 2u, 3u}) {
                const CopyOptions options{named.kernels, threads, streams};
                const std::string where =
                    std::string(streams ? ", streaming" : "") + ", threads " + std::to_string(threads);
                testing::random_plans(named, options, where);
                testing::random_checksums(named, options, where);
                testing::checksums_in_place(named, options, where);
                testing::large_entries(named, options, where);
            }
        }
        std::cout << named.name << ": passed\n";
    }
}
