// What calls of the CPU kernels from Python have in common.
#pragma once
#include <new>

#include "../cpu/floats.h"
#include "arrays.h"

namespace rk {
namespace bindings {

// How kernels are called: without the interpreter's lock, and with the arithmetic they rest on.
struct Outside {
  nanobind::gil_scoped_release release;
  UsualFloats usual;
};

inline void check(Status status) {
  if (status == Status::out_of_memory) throw std::bad_alloc();
}

inline std::int64_t item_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline Addresses addresses_of_rows(nanobind::handle data) {
  Addresses found;
  if (!found.assign(data.ptr())) throw nanobind::type_error("rows must be (n_segments, n) addresses");
  return found;
}

// The words of a secret key.
inline const std::uint32_t* key_of(nanobind::handle key) {
  Py_buffer view;
  if (PyObject_GetBuffer(key.ptr(), &view, PyBUF_SIMPLE) != 0) throw nanobind::python_error();
  const auto* words = static_cast<const std::uint32_t*>(view.buf);
  const bool fits = view.len == kDigestWords * 4 && reinterpret_cast<std::uintptr_t>(words) % 4 == 0;
  PyBuffer_Release(&view);
  require(fits, "the key must have the words of a block");
  return words;
}

}  // namespace bindings
}  // namespace rk
