// robustkern._cpu: checks shapes once, releases the GIL, calls the kernels. The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// A C-contiguous array of T with N axes, valid as long as its argument. A call of a small problem takes five, and
// nb::ndarray costs three times as much as the buffer protocol.
template <class T, std::size_t N>
class Array {
 public:
  T* data() const { return data_; }
  std::size_t shape(std::size_t axis) const { return shape_[axis]; }

  // False, and no Python error, where the object is no such array.
  bool assign(PyObject* object) {
    constexpr int access = std::is_const_v<T> ? 0 : PyBUF_WRITABLE;
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | access) != 0) {
      PyErr_Clear();
      return false;
    }
    const bool fits = view.ndim == static_cast<int>(N) && view.itemsize == static_cast<Py_ssize_t>(sizeof(T)) &&
                      view.format[0] != '\0' && view.format[1] == '\0' && std::strchr(kFormats, view.format[0]);
    if (fits) {
      data_ = static_cast<T*>(view.buf);
      for (std::size_t axis = 0; axis < N; ++axis) shape_[axis] = static_cast<std::size_t>(view.shape[axis]);
    }
    PyBuffer_Release(&view);
    return fits;
  }

 private:
  // Of the struct module, for native sizes; uint8 is for flags.
  static constexpr const char* kFormats = std::is_floating_point_v<T> ? "d"
                                          : sizeof(T) == 1            ? "?"
                                          : std::is_signed_v<T>       ? "lq"
                                                                      : "LQ";
  T* data_ = nullptr;
  std::size_t shape_[N] = {};
};

using Addresses = Array<const std::uint64_t, 2>;  // (n_segments, n) pointers
using Offsets = Array<const std::int64_t, 1>;     // (n_segments + 1)
using Matrix = Array<const double, 2>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(rk::Status status) {
  if (status == rk::Status::out_of_memory) throw std::bad_alloc();
}

const rk::Kernels& kernels(const char* isa) {
  const rk::Kernels* table = rk::kernels_for(isa);
  if (!table)
    throw std::invalid_argument("instruction set '" + std::string(isa) +
                                "' is not built or not supported by this processor");
  return *table;
}

rk::Rows view(const Addresses& data, const Offsets& offsets, int dtype) {
  require(offsets.shape(0) == data.shape(0) + 1, "offsets must have one entry more than there are segments");
  require(data.shape(1) >= 1 && data.shape(1) <= 65535, "the number of rows must be between 1 and 65535");
  require(dtype >= 0 && dtype <= 3, "unknown dtype code");
  return {reinterpret_cast<const void* const*>(data.data()), offsets.data(), static_cast<std::int64_t>(data.shape(0)),
          static_cast<std::int64_t>(data.shape(1)), static_cast<rk::DType>(dtype)};
}

std::int64_t cells_of(const Array<const std::int64_t, 1>& multiplicities) {
  std::int64_t cells = 0;
  for (std::size_t i = 0; i < multiplicities.shape(0); ++i) {
    require(multiplicities.data()[i] >= 0, "multiplicities must not be negative");
    cells += multiplicities.data()[i];
  }
  return cells;
}

int threads_for(const rk::Rows& rows, int requested) {
  const std::int64_t item = rows.dtype == rk::DType::float64 ? 8 : rows.dtype == rk::DType::float32 ? 4 : 2;
  return rk::usable_threads(requested, rows.columns() * rows.n * item);
}

void select_columns(const char* isa, Addresses data, Offsets offsets, int dtype, std::int64_t lo, std::int64_t hi,
                    std::int64_t nearest, std::optional<Array<const std::int64_t, 1>> multiplicities,
                    std::optional<Matrix> mix, std::optional<Matrix> measure, double scale,
                    std::optional<Addresses> out, std::optional<Array<double, 1>> sq_distances,
                    Array<std::uint8_t, 1> nonfinite, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  const std::size_t n = data.shape(1), selected = mix ? mix->shape(0) : n;
  require(!mix || (mix->shape(1) == n && mix->shape(0) >= 1 && mix->shape(0) <= 65535), "mix must have shape (k, n)");
  require(!measure || measure->shape(1) == n, "measure must have shape (m, n)");
  require(!multiplicities || multiplicities->shape(0) == selected, "one multiplicity for each selected row");
  const std::int64_t cells = multiplicities ? cells_of(*multiplicities) : static_cast<std::int64_t>(selected);
  require(0 <= lo && lo < hi && hi <= cells, "the window must be a non-empty range of the cells");
  require(0 <= nearest && nearest <= static_cast<std::int64_t>(selected),
          "no more values can be near than are selected");
  require(nearest == 0 || (hi - lo <= 2 && !multiplicities),
          "nearest values need a centre of at most two cells, and no multiplicities");
  require(!out || (out->shape(0) == data.shape(0) && out->shape(1) == 1), "one output for each segment");
  require(!sq_distances || sq_distances->shape(0) == (measure ? measure->shape(0) : n),
          "one distance for each measured row");
  require(nonfinite.shape(0) == n, "one flag for each row");
  const rk::Select select{lo,
                          hi,
                          nearest,
                          multiplicities ? multiplicities->data() : nullptr,
                          mix ? mix->data() : nullptr,
                          static_cast<std::int64_t>(selected),
                          measure ? measure->data() : nullptr,
                          measure ? static_cast<std::int64_t>(measure->shape(0)) : 0,
                          scale,
                          out ? reinterpret_cast<void* const*>(out->data()) : nullptr,
                          sq_distances ? sq_distances->data() : nullptr,
                          nonfinite.data()};
  rk::Status status;
  {
    nb::gil_scoped_release release;
    status = table.select_columns(rows, select, threads_for(rows, threads));
  }
  check(status);
}

void gram(const char* isa, Addresses data, Offsets offsets, int dtype,
          std::optional<Array<const std::int64_t, 1>> multiplicities, bool origin, double scale, bool single,
          Array<double, 2> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  const std::size_t m = data.shape(1) + (origin ? 1 : 0);
  require(out.shape(0) == m && out.shape(1) == m, "out must be square, one row for each row and the origin");
  require(!multiplicities || multiplicities->shape(0) == data.shape(1), "one multiplicity for each row");
  require(!multiplicities || cells_of(*multiplicities) >= 1, "some row must have a multiplicity above 0");
  rk::Status status;
  {
    nb::gil_scoped_release release;
    status = table.gram(rows, multiplicities ? multiplicities->data() : nullptr, origin, scale, single, out.data(),
                        threads_for(rows, threads));
  }
  check(status);
}

void row_sq_distances(const char* isa, Addresses data, Offsets offsets, int dtype, Addresses centre, double scale,
                      Array<double, 1> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  require(centre.shape(0) == data.shape(0) && centre.shape(1) == 1, "the centre must have the rows' segments");
  require(out.shape(0) == data.shape(1), "one distance for each row");
  rk::Status status;
  {
    nb::gil_scoped_release release;
    status = table.row_sq_distances(rows, reinterpret_cast<const void* const*>(centre.data()), scale, out.data(),
                                    threads_for(rows, threads));
  }
  check(status);
}

void weighted_row_sum(const char* isa, Addresses data, Offsets offsets, int dtype, Matrix weights, Addresses out,
                      int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  require(weights.shape(1) == data.shape(1), "weights must have shape (k, n)");
  require(out.shape(0) == data.shape(0) && out.shape(1) == weights.shape(0),
          "one output for each segment and weight row");
  rk::Status status;
  {
    nb::gil_scoped_release release;
    status = table.weighted_row_sum(rows, weights.data(), static_cast<std::int64_t>(weights.shape(0)),
                                    reinterpret_cast<void* const*>(out.data()), threads_for(rows, threads));
  }
  check(status);
}

std::uint64_t read_pass(const char* isa, Addresses data, Offsets offsets, int dtype, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  nb::gil_scoped_release release;
  return table.read_pass(rows, threads_for(rows, threads));
}

// Where the first element of an array of any dtype and strides lies.
std::uintptr_t address_of(nb::handle array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_STRIDES) != 0) throw nb::python_error();
  const auto address = reinterpret_cast<std::uintptr_t>(view.buf);
  PyBuffer_Release(&view);
  return address;
}

// Where the arrays begin; nothing unless all are C-contiguous and of one class, dtype and shape.
std::optional<std::vector<std::uintptr_t>> addresses_of(nb::sequence arrays) {
  std::vector<std::uintptr_t> found;
  std::vector<Py_ssize_t> shape;
  nb::handle type;
  nb::object dtype;
  for (nb::handle array : arrays) {
    Py_buffer view;
    if ((type.ptr() && !array.type().is(type)) || PyObject_GetBuffer(array.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      return std::nullopt;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(view.buf);
    if (!type.ptr()) shape.assign(view.shape, view.shape + view.ndim);
    const bool same = view.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), view.shape);
    PyBuffer_Release(&view);
    nb::object its = array.attr("dtype");
    if (!type.ptr()) {
      type = array.type();
      dtype = its;
    }
    if (!same || !(its.is(dtype) || its.equal(dtype))) return std::nullopt;  // unpickled ones are equal copies
    found.push_back(address);
  }
  return found;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const char* const* name = rk::supported_isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace

namespace nanobind::detail {
template <class T, std::size_t N>
struct type_caster<Array<T, N>> {
  using Given = Array<T, N>;
  NB_TYPE_CASTER(Given, const_name("ndarray"))
  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept { return value.assign(source.ptr()); }
};
}  // namespace nanobind::detail

NB_MODULE(_cpu, m) {
  m.attr("__version__") = RK_VERSION;
  m.attr("compiler") = RK_COMPILER;
  m.def("supported_isas", &supported_isas);
  m.def("max_threads", &rk::max_threads);
  m.def("address_of", &address_of, "array"_a);
  m.def("addresses_of", &addresses_of, "arrays"_a);
  m.def("select_columns", &select_columns, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "lo"_a, "hi"_a, "nearest"_a,
        "multiplicities"_a.none(), "mix"_a.none(), "measure"_a.none(), "scale"_a, "out"_a.none(),
        "sq_distances"_a.none(), "nonfinite"_a, "threads"_a);
  m.def("gram", &gram, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "multiplicities"_a.none(), "origin"_a, "scale"_a,
        "single"_a, "out"_a, "threads"_a);
  m.def("row_sq_distances", &row_sq_distances, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "centre"_a, "scale"_a,
        "out"_a, "threads"_a);
  m.def("weighted_row_sum", &weighted_row_sum, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "weights"_a, "out"_a,
        "threads"_a);
  m.def("read_pass", &read_pass, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "threads"_a);
}
