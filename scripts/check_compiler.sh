#!/bin/sh
# Says in one sentence when there is no compiler that understands C++20, before anything is downloaded.
set -eu

compiler=${CXX:-}
for name in ${CXX:-c++ g++ clang++}; do
    if command -v "$name" >/dev/null 2>&1; then
        compiler=$name
        break
    fi
    compiler=""
done
if [ -z "$compiler" ]; then
    echo "kvstore needs a C++20 compiler (g++ 11 or clang 14, or later) and found none${CXX:+ at CXX=$CXX}; install one (for example the package g++) or set CXX to its path." >&2
    exit 1
fi
if ! echo '#include <span>
int main() { return std::span<int>().empty() ? 0 : 1; }' | "$compiler" -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1; then
    echo "kvstore needs a C++20 compiler (g++ 11 or clang 14, or later), and $compiler cannot compile C++20; set CXX to a newer one." >&2
    exit 1
fi
