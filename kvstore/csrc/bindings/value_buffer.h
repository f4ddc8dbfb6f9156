// Arrays of plain values that Python passes in through the buffer protocol, and bytes of them that go back.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "buffer.h"

namespace kvstore::bindings {

class ValueBuffer : public BufferView {
  public:
    using BufferView::BufferView;

    // The buffer as values of `Value`. Throws nanobind::value_error when it does not hold a whole number of them.
    template <typename Value>
    std::span<const Value> values(const char* name) const {
        if (size_bytes() % sizeof(Value) != 0) {
            const std::string message = std::string(name) + " has " + std::to_string(size_bytes()) +
                                        " bytes, which is no multiple of " + std::to_string(sizeof(Value));
            throw nanobind::value_error(message.c_str());
        }
        return {static_cast<const Value*>(data()), size_bytes() / sizeof(Value)};
    }
};

template <typename Value>
nanobind::bytes bytes_of(std::span<const Value> values) {
    return nanobind::bytes(values.data(), values.size_bytes());
}

}  // namespace kvstore::bindings
