// What both extension modules take from Python: C-contiguous arrays by the buffer protocol, rows as addresses, and the
// primitives' arguments, checked against each other.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "../kernels.h"

namespace rk {
namespace bindings {

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
using Divisors = std::optional<Array<const double, 1>>;
using Cells = std::optional<Array<const std::int64_t, 1>>;  // multiplicities

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void* const* targets(const Addresses& out) { return reinterpret_cast<void* const*>(out.data()); }

inline DType dtype_of(int code) {
  require(code >= 0 && code <= 3, "unknown dtype code");
  return static_cast<DType>(code);
}

inline Rows rows_of(const Addresses& data, const Offsets& offsets, int dtype) {
  require(offsets.shape(0) == data.shape(0) + 1, "offsets must have one entry more than there are segments");
  require(data.shape(1) >= 1 && data.shape(1) <= 65535, "the number of rows must be between 1 and 65535");
  return {reinterpret_cast<const void* const*>(data.data()), offsets.data(), static_cast<std::int64_t>(data.shape(0)),
          static_cast<std::int64_t>(data.shape(1)), dtype_of(dtype)};
}

// None: all 1.
inline const double* divisors_of(const Divisors& divisors, std::size_t count) {
  if (!divisors) return nullptr;
  require(divisors->shape(0) == count, "one divisor for each row of weights");
  for (std::size_t r = 0; r < count; ++r)
    require(divisors->data()[r] > 0 && divisors->data()[r] <= std::numeric_limits<double>::max(),
            "divisors must be positive and finite");
  return divisors->data();
}

inline std::int64_t cells_of(const Array<const std::int64_t, 1>& multiplicities) {
  std::int64_t cells = 0;
  for (std::size_t i = 0; i < multiplicities.shape(0); ++i) {
    require(multiplicities.data()[i] >= 0, "multiplicities must not be negative");
    cells += multiplicities.data()[i];
  }
  return cells;
}

inline Select select_of(const Rows& rows, std::int64_t lo, std::int64_t hi, std::int64_t nearest,
                        const Cells& multiplicities, const std::optional<Matrix>& mix, const Divisors& mix_divisors,
                        const std::optional<Matrix>& measure, const Divisors& measure_divisors, double scale,
                        const std::optional<Addresses>& out, const std::optional<Array<double, 1>>& sq_distances,
                        const Array<std::uint8_t, 1>& nonfinite) {
  const std::size_t n = static_cast<std::size_t>(rows.n), selected = mix ? mix->shape(0) : n;
  require(!mix || (mix->shape(1) == n && mix->shape(0) >= 1 && mix->shape(0) <= 65535), "mix must have shape (k, n)");
  require(!measure || measure->shape(1) == n, "measure must have shape (m, n)");
  require(!multiplicities || multiplicities->shape(0) == selected, "one multiplicity for each selected row");
  const std::int64_t cells = multiplicities ? cells_of(*multiplicities) : static_cast<std::int64_t>(selected);
  require(0 <= lo && lo < hi && hi <= cells, "the window must be a non-empty range of the cells");
  require(0 <= nearest && nearest <= static_cast<std::int64_t>(selected),
          "no more values can be near than are selected");
  require(nearest == 0 || !multiplicities, "nearest values are taken without multiplicities");
  require(!out || (out->shape(0) == static_cast<std::size_t>(rows.n_segments) && out->shape(1) == 1),
          "one output for each segment");
  require(!sq_distances || sq_distances->shape(0) == (measure ? measure->shape(0) : n),
          "one distance for each measured row");
  require(nonfinite.shape(0) == n, "one flag for each row");
  return {lo,
          hi,
          nearest,
          multiplicities ? multiplicities->data() : nullptr,
          mix ? mix->data() : nullptr,
          divisors_of(mix_divisors, mix ? mix->shape(0) : 0),
          static_cast<std::int64_t>(selected),
          measure ? measure->data() : nullptr,
          divisors_of(measure_divisors, measure ? measure->shape(0) : 0),
          measure ? static_cast<std::int64_t>(measure->shape(0)) : 0,
          scale,
          out ? targets(*out) : nullptr,
          sq_distances ? sq_distances->data() : nullptr,
          nonfinite.data()};
}

inline void check_gram(const Rows& rows, const Cells& multiplicities, bool origin, const Array<double, 2>& out) {
  const std::size_t n = static_cast<std::size_t>(rows.n), m = n + (origin ? 1 : 0);
  require(out.shape(0) >= 1 && out.shape(0) <= m && out.shape(1) == m,
          "out must have a column for each row and the origin, and at most as many lines");
  require(!multiplicities || multiplicities->shape(0) == n, "one multiplicity for each row");
  require(!multiplicities || cells_of(*multiplicities) >= 1, "some row must have a multiplicity above 0");
}

// None: the origin.
inline Centres centres_of(const Rows& rows, const std::optional<Addresses>& centres, const Array<double, 2>& out) {
  require(!centres || (centres->shape(0) == static_cast<std::size_t>(rows.n_segments) && centres->shape(1) >= 1),
          "the centres must have the rows' segments");
  const std::size_t count = centres ? centres->shape(1) : 1;
  require(out.shape(0) == count && out.shape(1) == static_cast<std::size_t>(rows.n),
          "one distance for each centre and row");
  return {centres ? targets(*centres) : nullptr, static_cast<std::int64_t>(count)};
}

inline void check_sum(const Rows& rows, const Matrix& weights, const Addresses& out) {
  require(weights.shape(1) == static_cast<std::size_t>(rows.n), "weights must have shape (k, n)");
  require(out.shape(0) == static_cast<std::size_t>(rows.n_segments) && out.shape(1) == weights.shape(0),
          "one output for each segment and weight row");
}

}  // namespace bindings
}  // namespace rk

namespace nanobind::detail {
template <class T, std::size_t N>
struct type_caster<rk::bindings::Array<T, N>> {
  using Given = rk::bindings::Array<T, N>;
  NB_TYPE_CASTER(Given, const_name("ndarray"))
  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept { return value.assign(source.ptr()); }
};
}  // namespace nanobind::detail
