// robustkern._cpu: checks shapes once, releases the GIL, calls the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "calls.h"
#include "leaves.h"
#if defined(__unix__) || defined(__APPLE__)
#define RK_FILES
#include "files.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace rk::bindings;

namespace {

const rk::Kernels& kernels(const char* isa) {
  const rk::Kernels* table = rk::kernels_for(isa);
  if (!table)
    throw std::invalid_argument("instruction set '" + std::string(isa) +
                                "' is not built or not supported by this processor");
  return *table;
}

int threads_for(const rk::Rows& rows, int requested) {
  return rk::usable_threads(requested, rows.columns() * rows.n * item_of(rows.dtype));
}

// The rows' addresses, or a tuple that says where they lie in files: then one segment of them, and false where one
// could not be read.
bool select_columns(const char* isa, nb::handle data, Offsets offsets, int dtype, std::int64_t lo, std::int64_t hi,
                    std::int64_t nearest, Cells multiplicities, std::optional<Matrix> mix, Divisors mix_divisors,
                    std::optional<Matrix> measure, Divisors measure_divisors, double scale,
                    std::optional<Addresses> out, std::optional<Array<double, 1>> sq_distances,
                    Array<std::uint8_t, 1> nonfinite, int threads) {
  const rk::Kernels& table = kernels(isa);
  const auto made = [&](const rk::Rows& rows) {
    return select_of(rows, lo, hi, nearest, multiplicities, mix, mix_divisors, measure, measure_divisors, scale, out,
                     sq_distances, nonfinite);
  };
#ifdef RK_FILES
  if (is_in_files(data)) {
    const rk::Stretches files = stretches_of(data);
    const rk::Rows rows = rows_of(files, offsets, dtype);
    const rk::Select select = made(rows);
    const std::int64_t n = rows.n, m = !sq_distances ? 0 : measure ? select.n_measured : n;
    std::vector<std::uint8_t> flags(static_cast<std::size_t>(n * files.parts()));
    std::vector<double> squares(static_cast<std::size_t>(m * files.parts()));
    const bool read = in_parts(table, files, rows, select.out, 1, threads, [&](const Part& part) {
      rk::Select one = select;
      one.out = part.out;
      one.nonfinite = flags.data() + part.index * n;
      one.sq_distances = m ? squares.data() + part.index * m : nullptr;
      return table.select_columns(part.rows, one, 1);
    });
    for (std::int64_t k = 0; read && k < files.parts(); ++k) {
      for (std::int64_t i = 0; i < n; ++i) select.nonfinite[i] |= flags[static_cast<std::size_t>(k * n + i)];
      for (std::int64_t i = 0; i < m; ++i) select.sq_distances[i] += squares[static_cast<std::size_t>(k * m + i)];
    }
    return read;
  }
#endif
  const rk::Rows rows = rows_of(addresses_of_rows(data), offsets, dtype);
  const rk::Select select = made(rows);
  rk::Status status;
  {
    const Outside outside;
    status = table.select_columns(rows, select, threads_for(rows, threads));
  }
  check(status);
  return true;
}

void gram(const char* isa, Addresses data, Offsets offsets, int dtype, Cells multiplicities, bool origin, double scale,
          bool single, Array<double, 2> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = rows_of(data, offsets, dtype);
  check_gram(rows, multiplicities, origin, out);
  rk::Status status;
  {
    const Outside outside;
    status = table.gram(rows, multiplicities ? multiplicities->data() : nullptr, origin, scale, single,
                        static_cast<std::int64_t>(out.shape(0)), out.data(), threads_for(rows, threads));
  }
  check(status);
}

void row_sq_distances(const char* isa, Addresses data, Offsets offsets, int dtype, std::optional<Addresses> centres,
                      double scale, bool exact, Array<double, 2> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = rows_of(data, offsets, dtype);
  const rk::Centres from = centres_of(rows, centres, out);
  rk::Status status;
  {
    const Outside outside;
    status = table.row_sq_distances(rows, from, scale, exact, out.data(), threads_for(rows, threads));
  }
  check(status);
}

void sq_distances_to_average(const char* isa, Addresses data, Offsets offsets, int dtype, Array<const double, 1> shares,
                             Array<double, 1> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = rows_of(data, offsets, dtype);
  const auto n = static_cast<std::size_t>(rows.n);
  require(shares.shape(0) == n && out.shape(0) == n, "one share and one distance for each row");
  rk::Status status;
  {
    const Outside outside;
    status = table.sq_distances_to_average(rows, shares.data(), out.data(), threads_for(rows, threads));
  }
  check(status);
}

bool weighted_row_sum(const char* isa, nb::handle data, Offsets offsets, int dtype, Matrix weights, Divisors divisors,
                      Addresses out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const double* by = divisors_of(divisors, weights.shape(0));
  const auto k = static_cast<std::int64_t>(weights.shape(0));
#ifdef RK_FILES
  if (is_in_files(data)) {
    const rk::Stretches files = stretches_of(data);
    const rk::Rows rows = rows_of(files, offsets, dtype);
    check_sum(rows, weights, out);
    return in_parts(table, files, rows, targets(out), k, threads, [&](const Part& part) {
      return table.weighted_row_sum(part.rows, weights.data(), by, k, part.out, 1);
    });
  }
#endif
  const rk::Rows rows = rows_of(addresses_of_rows(data), offsets, dtype);
  check_sum(rows, weights, out);
  rk::Status status;
  {
    const Outside outside;
    status = table.weighted_row_sum(rows, weights.data(), by, k, targets(out), threads_for(rows, threads));
  }
  check(status);
  return true;
}

void update_momenta(const char* isa, Addresses data, Offsets offsets, int dtype, std::optional<Addresses> corrections,
                    double keep, Array<const double, 1> gradient_scales,
                    std::optional<Array<const double, 1>> correction_scales, Addresses momenta, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = rows_of(data, offsets, dtype);
  const std::size_t n = data.shape(1);
  const auto fits = [&](const Addresses& other) { return other.shape(0) == data.shape(0) && other.shape(1) == n; };
  require(fits(momenta) && (!corrections || fits(*corrections)),
          "momenta and corrections must have the rows' segments");
  require(gradient_scales.shape(0) == n, "one scale for each gradient");
  require(!corrections || (correction_scales && correction_scales->shape(0) == n), "one scale for each correction");
  const rk::Momenta how{corrections ? targets(*corrections) : nullptr, keep, gradient_scales.data(),
                        correction_scales ? correction_scales->data() : nullptr};
  rk::Status status;
  {
    const Outside outside;
    status = table.update_momenta(rows, how, targets(momenta), threads_for(rows, threads));
  }
  check(status);
}

std::uint64_t read_pass(const char* isa, Addresses data, Offsets offsets, int dtype, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = rows_of(data, offsets, dtype);
  const Outside outside;
  return table.read_pass(rows, threads_for(rows, threads));
}

// Of contiguous memory, under a key of kDigestWords words and a point.
std::uint64_t digest(const char* isa, nb::handle data, nb::handle key, std::uint64_t point) {
  const rk::Kernels& table = kernels(isa);
  const std::uint32_t* words = key_of(key);
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
  std::uint64_t value;
  {
    nb::gil_scoped_release release;
    value = table.digest(view.buf, view.len, words, point);
  }
  PyBuffer_Release(&view);
  return value;
}

#ifdef RK_FILES
// Read rows in files into memory, and hash them; true where all could be read.
bool read_rows(const char* isa, nb::handle data, Array<const std::uint64_t, 1> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Stretches files = stretches_of(data);
  require(out.shape(0) == static_cast<std::size_t>(files.n), "one place for each row");
  nb::gil_scoped_release release;
  return files.read(table, rk::usable_threads(threads, files.bytes * files.n),
                    reinterpret_cast<char* const*>(out.data()), [](const rk::Stretches::Part&) {});
}
#endif

// Where the first element of an array of any dtype and strides lies.
std::uintptr_t address_of(nb::handle array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_STRIDES) != 0) throw nb::python_error();
  const auto address = reinterpret_cast<std::uintptr_t>(view.buf);
  PyBuffer_Release(&view);
  return address;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const char* const* name = rk::supported_isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.attr("__version__") = RK_VERSION;
  m.attr("compiler") = RK_COMPILER;
  m.attr("cuda") = RK_CUDA_STATE;
  m.def("supported_isas", &supported_isas);
  m.def("max_threads", &rk::max_threads);
  m.def("address_of", &address_of, "array"_a);
  m.def("look_at", &look_at, "columns"_a, "inputs"_a, "ndarray"_a, "torch"_a.none(), "begins"_a);
  m.def("select_columns", &select_columns, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "lo"_a, "hi"_a, "nearest"_a,
        "multiplicities"_a.none(), "mix"_a.none(), "mix_divisors"_a.none(), "measure"_a.none(),
        "measure_divisors"_a.none(), "scale"_a, "out"_a.none(), "sq_distances"_a.none(), "nonfinite"_a, "threads"_a);
  m.def("gram", &gram, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "multiplicities"_a.none(), "origin"_a, "scale"_a,
        "single"_a, "out"_a, "threads"_a);
  m.def("row_sq_distances", &row_sq_distances, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "centres"_a.none(), "scale"_a,
        "exact"_a, "out"_a, "threads"_a);
  m.def("sq_distances_to_average", &sq_distances_to_average, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "shares"_a,
        "out"_a, "threads"_a);
  m.def("weighted_row_sum", &weighted_row_sum, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "weights"_a,
        "divisors"_a.none(), "out"_a, "threads"_a);
  m.def("update_momenta", &update_momenta, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "corrections"_a.none(), "keep"_a,
        "gradient_scales"_a, "correction_scales"_a.none(), "momenta"_a, "threads"_a);
#ifdef RK_FILES
  m.def("read_rows", &read_rows, "isa"_a, "data"_a, "out"_a, "threads"_a);
#endif
  m.def("digest", &digest, "isa"_a, "data"_a, "key"_a, "point"_a);
  m.def("read_pass", &read_pass, "isa"_a, "data"_a, "offsets"_a, "dtype"_a, "threads"_a);
}
