// The little that these tests need of a test framework: a failed check says where and what, and ends the program.
#pragma once

#include <cstdlib>
#include <iostream>
#include <string>

namespace kvstore::testing {

// The builtins rather than std::source_location, which clang 14 does not offer with every standard library.
inline void check(bool holds, const std::string& what, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    if (!holds) {
        std::cerr << file << ":" << line << ": " << what << "\n";
        std::exit(1);
    }
}

// True when `action` throws an Error whose message contains `part`.
template <typename Error, typename Action>
bool throws(Action action, const std::string& part) {
    try {
        action();
    } catch (const Error& error) {
        return std::string(error.what()).find(part) != std::string::npos;
    }
    return false;
}

}  // namespace kvstore::testing
