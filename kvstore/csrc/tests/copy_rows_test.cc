#include "copy/copy_rows.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"

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

void random_plans() {
    std::mt19937_64 random(6);
    for (int round = 0; round < 500; ++round) {
        const std::size_t rows = random() % 9;
        const std::size_t row_bytes = random() % 5000;
        const std::size_t destination_stride = row_bytes + (random() % 2 == 0 ? 0 : random() % 100);
        const std::size_t source_stride = row_bytes + (random() % 2 == 0 ? 0 : random() % 100);
        const std::size_t destination_size = extent(rows, row_bytes, destination_stride);
        const std::size_t source_size = extent(rows, row_bytes, source_stride);
        const auto destination = std::make_unique<unsigned char[]>(destination_size);
        const auto source = std::make_unique<unsigned char[]>(source_size);
        std::generate_n(source.get(), source_size, [&] { return static_cast<unsigned char>(random()); });
        std::generate_n(destination.get(), destination_size, [&] { return static_cast<unsigned char>(random()); });

        std::vector<unsigned char> expected(destination.get(), destination.get() + destination_size);
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t byte = 0; byte < row_bytes; ++byte) {
                expected[row * destination_stride + byte] = source[row * source_stride + byte];
            }
        }
        const std::vector<RowCopy> plan{
            {address(destination.get()), address(source.get()), rows, row_bytes, destination_stride, source_stride}};
        check_plan(plan);
        copy_rows(plan);
        check(std::equal(expected.begin(), expected.end(), destination.get()), "round " + std::to_string(round));
    }
}

void bad_plans() {
    constexpr std::uint64_t huge = std::numeric_limits<std::uint64_t>::max();
    const auto refused = [](const RowCopy& copy, const std::string& part) {
        const std::vector<RowCopy> plan{{64, 4096, 1, 64, 64, 64}, copy};
        return throws<std::invalid_argument>([&] { check_plan(plan); }, "entry 1 of the plan " + part);
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
}

}  // namespace
}  // namespace kvstore

int main() {
    kvstore::random_plans();
    kvstore::bad_plans();
    std::cout << "copy_rows: passed\n";
}
