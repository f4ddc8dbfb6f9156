// The bytes of an object that has the buffer protocol, for as long as they are looked at.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>

namespace kvstore::bindings {

class BufferView {
  public:
    // `flags` as of PyObject_GetBuffer: PyBUF_SIMPLE to read, PyBUF_WRITABLE to write. Throws what that raises.
    explicit BufferView(nanobind::handle object, int flags = PyBUF_SIMPLE) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
            throw nanobind::python_error();
        }
    }
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;

    void* data() const { return view_.buf; }
    std::size_t size_bytes() const { return static_cast<std::size_t>(view_.len); }

  private:
    Py_buffer view_{};
};

}  // namespace kvstore::bindings
