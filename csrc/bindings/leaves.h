// Where arrays of Python begin, without a view of each: a call on a model asks for some thousands of them.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "arrays.h"

namespace rk {
namespace bindings {

// As dlpack.h, version 1, has them: what describes an array, and a library's table of functions.
struct DlTensor {
  void* data;
  std::int32_t device_type, device, ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DlExchange {
  std::uint32_t major, minor;
  void *previous, *allocate, *managed_from, *managed_to;
  int (*describe)(void* object, DlTensor* out);  // -1 with a Python error; nothing is owned by `out`
  void* stream;
};
constexpr std::int32_t kDlHost = 1;

// How arrays of a leaf look in its rows.
enum class Look : char { other, plain, recorded };  // recorded: plain, and torch records gradients of some

// torch's plain tensors are of these classes; an address below `least` is an offset in a storage that is not there.
struct TorchTensors {
  const DlExchange* exchange = nullptr;
  PyObject* classes = nullptr;  // a tuple
  bool records = false;
  std::int64_t least = 0;

  // None: torch is not there, or has no such table.
  static TorchTensors of(nanobind::handle given) {
    TorchTensors found;
    if (given.is_none()) return found;
    const nanobind::tuple parts = nanobind::borrow<nanobind::tuple>(given);
    found.exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(parts[0].ptr(), "dlpack_exchange_api"));
    if (!found.exchange) throw nanobind::python_error();
    if (found.exchange->major != 1 || !found.exchange->describe) found.exchange = nullptr;
    found.classes = PyTuple_GET_ITEM(parts.ptr(), 1);
    found.records = nanobind::cast<bool>(parts[2]);
    found.least = nanobind::cast<std::int64_t>(parts[3]);
    return found;
  }
  bool have(PyObject* object) const {
    if (!exchange) return false;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(classes); ++k)
      if (PyTuple_GET_ITEM(classes, k) == reinterpret_cast<PyObject*>(Py_TYPE(object))) return true;
    return false;
  }
};

// What a method or an attribute of an object says; false, and no Python error, where it raises.
inline bool says(PyObject* taken, bool expected) {
  const bool as_expected = taken == (expected ? Py_True : Py_False);
  if (!taken) PyErr_Clear();
  Py_XDECREF(taken);
  return as_expected;
}

inline bool is_contiguous(const DlTensor& tensor) {
  std::int64_t step = 1;
  for (std::int32_t axis = tensor.ndim - 1; axis >= 0; --axis) {
    if (tensor.strides && tensor.shape[axis] != 1 && tensor.strides[axis] != step) return false;
    step *= tensor.shape[axis];
  }
  return true;
}

// Tensors of the host's memory, alike and contiguous, that are no negated views; the first `inputs` may be recorded.
inline Look look_at_tensors(const TorchTensors& torch, PyObject* const* objects, Py_ssize_t count, Py_ssize_t inputs,
                            std::int64_t* begins) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  DlTensor first{};
  bool recorded = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    DlTensor tensor{};
    if (!torch.have(objects[i])) return Look::other;
    if (torch.exchange->describe(objects[i], &tensor) != 0) {
      PyErr_Clear();
      return Look::other;
    }
    if (i == 0) first = tensor;
    const bool alike = tensor.ndim == first.ndim && tensor.code == first.code && tensor.bits == first.bits &&
                       tensor.lanes == 1 && std::equal(tensor.shape, tensor.shape + tensor.ndim, first.shape);
    begins[i] = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset);
    if (!alike || tensor.device_type != kDlHost || !is_contiguous(tensor) || begins[i] < torch.least ||
        !says(PyObject_CallMethodNoArgs(objects[i], is_neg), false))
      return Look::other;
    recorded |= torch.records && i < inputs && !says(PyObject_GetAttr(objects[i], requires_grad), false);
  }
  return recorded ? Look::recorded : Look::plain;
}

// NumPy's arrays, no subclass, alike and C-contiguous.
inline Look look_at_ndarrays(PyTypeObject* ndarray, PyObject* const* objects, Py_ssize_t count, std::int64_t* begins) {
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  std::vector<Py_ssize_t> shape;
  nanobind::object kind;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_buffer view;
    if (Py_TYPE(objects[i]) != ndarray || PyObject_GetBuffer(objects[i], &view, PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      return Look::other;
    }
    begins[i] = reinterpret_cast<std::int64_t>(view.buf);
    if (i == 0) shape.assign(view.shape, view.shape + view.ndim);
    const bool same = view.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), view.shape);
    PyBuffer_Release(&view);
    const nanobind::object its = nanobind::steal(PyObject_GetAttr(objects[i], dtype));
    if (i == 0) kind = its;
    if (!same || !its.ptr() || !(its.is(kind) || its.equal(kind)))
      return Look::other;  // unpickled ones are equal copies
  }
  return Look::plain;
}

// For each column of arrays its look, and where they are plain where they begin, in the lines of `begins`, which may be
// longer.
inline nanobind::bytes look_at(nanobind::list columns, Py_ssize_t inputs, nanobind::handle ndarray,
                               nanobind::handle torch, Array<std::int64_t, 2> begins) {
  const TorchTensors tensors = TorchTensors::of(torch);
  require(begins.shape(0) == columns.size(), "one line of begins for each column");
  std::string found;
  for (std::size_t k = 0; k < columns.size(); ++k) {
    const auto column = nanobind::steal(PySequence_Fast(columns[k].ptr(), "a column must be a sequence"));
    if (!column.ptr()) throw nanobind::python_error();
    PyObject* const* objects = PySequence_Fast_ITEMS(column.ptr());
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(column.ptr());
    require(count >= 1 && static_cast<std::size_t>(count) <= begins.shape(1), "a line of begins is too short");
    std::int64_t* line = begins.data() + k * begins.shape(1);
    const bool numpy = reinterpret_cast<PyObject*>(Py_TYPE(objects[0])) == ndarray.ptr();
    const Look look = numpy ? look_at_ndarrays(reinterpret_cast<PyTypeObject*>(ndarray.ptr()), objects, count, line)
                            : look_at_tensors(tensors, objects, count, inputs, line);
    found.push_back(static_cast<char>(look));
  }
  return nanobind::bytes(found.data(), found.size());
}

}  // namespace bindings
}  // namespace rk
