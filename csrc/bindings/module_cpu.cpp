// robustkern._cpu: checks shapes once, releases the GIL, calls the kernels. The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, std::size_t N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Addresses = Array<const std::uint64_t, 2>;   // (n_segments, n) pointers
using Addresses1 = Array<const std::uint64_t, 1>;  // (n_segments) pointers
using Offsets = Array<const std::int64_t, 1>;      // (n_segments + 1)
using Matrix = Array<const double, 2>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(rk::Status status) {
  if (status == rk::Status::out_of_memory) throw std::bad_alloc();
}

const rk::Kernels& kernels(const std::string& isa) {
  const rk::Kernels* table = rk::kernels_for(isa.c_str());
  if (!table)
    throw std::invalid_argument("instruction set '" + isa + "' is not built or not supported by this processor");
  return *table;
}

rk::Rows view(const Addresses& data, const Offsets& offsets, int dtype) {
  require(offsets.shape(0) == data.shape(0) + 1, "offsets must have one entry more than there are segments");
  require(data.shape(1) >= 1 && data.shape(1) <= 65535, "the number of rows must be between 1 and 65535");
  require(dtype >= 0 && dtype <= 3, "unknown dtype code");
  return {reinterpret_cast<const void* const*>(data.data()), offsets.data(), static_cast<std::int64_t>(data.shape(0)),
          static_cast<std::int64_t>(data.shape(1)), static_cast<rk::DType>(dtype)};
}

int threads_for(const rk::Rows& rows, int requested) {
  const std::int64_t item = rows.dtype == rk::DType::float64 ? 8 : rows.dtype == rk::DType::float32 ? 4 : 2;
  return rk::usable_threads(requested, rows.columns() * rows.n * item);
}

void select_columns(const std::string& isa, Addresses data, Offsets offsets, int dtype, std::int64_t lo,
                    std::int64_t hi, std::optional<Array<const std::int64_t, 1>> multiplicities,
                    std::optional<Matrix> mix, std::optional<Matrix> measure, double scale,
                    std::optional<Addresses1> out, std::optional<Array<double, 1>> sq_distances,
                    Array<std::uint8_t, 1> nonfinite, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  const std::size_t n = data.shape(1), selected = mix ? mix->shape(0) : n;
  require(!mix || (mix->shape(1) == n && mix->shape(0) >= 1 && mix->shape(0) <= 65535), "mix must have shape (k, n)");
  require(!measure || measure->shape(1) == n, "measure must have shape (m, n)");
  require(!multiplicities || multiplicities->shape(0) == selected, "one multiplicity for each selected row");
  std::int64_t cells = static_cast<std::int64_t>(selected);
  if (multiplicities) {
    cells = 0;
    for (std::size_t i = 0; i < selected; ++i) cells += multiplicities->data()[i];
  }
  require(0 <= lo && lo < hi && hi <= cells, "the window must be a non-empty range of the cells");
  require(!out || out->shape(0) == data.shape(0), "one output for each segment");
  require(!sq_distances || sq_distances->shape(0) == (measure ? measure->shape(0) : n),
          "one distance for each measured row");
  require(nonfinite.shape(0) == n, "one flag for each row");
  const rk::Select select{lo,
                          hi,
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

void gram(const std::string& isa, Addresses data, Offsets offsets, int dtype,
          std::optional<Array<const std::int64_t, 1>> multiplicities, bool origin, double scale, bool single,
          Array<double, 2> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  const std::size_t m = data.shape(1) + (origin ? 1 : 0);
  require(out.shape(0) == m && out.shape(1) == m, "out must be square, one row for each row and the origin");
  require(!multiplicities || multiplicities->shape(0) == data.shape(1), "one multiplicity for each row");
  rk::Status status;
  {
    nb::gil_scoped_release release;
    status = table.gram(rows, multiplicities ? multiplicities->data() : nullptr, origin, scale, single,
                        out.data(), threads_for(rows, threads));
  }
  check(status);
}

void row_sq_distances(const std::string& isa, Addresses data, Offsets offsets, int dtype, Addresses1 centre,
                      double scale, Array<double, 1> out, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  require(centre.shape(0) == data.shape(0), "the centre must have the rows' segments");
  require(out.shape(0) == data.shape(1), "one distance for each row");
  rk::Status status;
  {
    nb::gil_scoped_release release;
    status = table.row_sq_distances(rows, reinterpret_cast<const void* const*>(centre.data()), scale, out.data(),
                                    threads_for(rows, threads));
  }
  check(status);
}

void weighted_row_sum(const std::string& isa, Addresses data, Offsets offsets, int dtype, Matrix weights, Addresses out,
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

std::uint64_t read_pass(const std::string& isa, Addresses data, Offsets offsets, int dtype, int threads) {
  const rk::Kernels& table = kernels(isa);
  const rk::Rows rows = view(data, offsets, dtype);
  nb::gil_scoped_release release;
  return table.read_pass(rows, threads_for(rows, threads));
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
  m.def("supported_isas", &supported_isas);
  m.def("max_threads", &rk::max_threads);
  m.def("select_columns", &select_columns, "isa"_a, "data"_a.noconvert(), "offsets"_a.noconvert(), "dtype"_a, "lo"_a,
        "hi"_a, "multiplicities"_a.noconvert().none(), "mix"_a.noconvert().none(), "measure"_a.noconvert().none(),
        "scale"_a, "out"_a.noconvert().none(), "sq_distances"_a.noconvert().none(), "nonfinite"_a.noconvert(),
        "threads"_a);
  m.def("gram", &gram, "isa"_a, "data"_a.noconvert(), "offsets"_a.noconvert(), "dtype"_a,
        "multiplicities"_a.noconvert().none(), "origin"_a, "scale"_a, "single"_a, "out"_a.noconvert(), "threads"_a);
  m.def("row_sq_distances", &row_sq_distances, "isa"_a, "data"_a.noconvert(), "offsets"_a.noconvert(), "dtype"_a,
        "centre"_a.noconvert(), "scale"_a, "out"_a.noconvert(), "threads"_a);
  m.def("weighted_row_sum", &weighted_row_sum, "isa"_a, "data"_a.noconvert(), "offsets"_a.noconvert(), "dtype"_a,
        "weights"_a.noconvert(), "out"_a.noconvert(), "threads"_a);
  m.def("read_pass", &read_pass, "isa"_a, "data"_a.noconvert(), "offsets"_a.noconvert(), "dtype"_a, "threads"_a);
}
