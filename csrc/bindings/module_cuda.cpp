// robustkern._cuda: checks shapes once, releases the GIL, calls the kernels. Built against the CUDA runtime, or for
// tests against its emulation.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "../cuda/kernels.h"
#include "arrays.h"
#if defined(RK_EMULATED)
#include "../emulation/emulation.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace rk::bindings;

namespace {

// Memory that Python hands out: allocate(bytes) returns its address, and keeps it until the call has returned.
void* allocate(void* context, std::size_t bytes) {
  nb::gil_scoped_acquire acquire;
  const nb::handle function(static_cast<PyObject*>(context));
  return reinterpret_cast<void*>(nb::cast<std::uintptr_t>(function(bytes)));
}

rk::cuda::Call call_on(int device, std::uintptr_t stream, nb::handle allocator) {
  return {device, reinterpret_cast<void*>(stream), &allocate, allocator.ptr()};
}

void select_columns(int device, std::uintptr_t stream, nb::callable allocator, Addresses data, Offsets offsets,
                    int dtype, std::int64_t lo, std::int64_t hi, std::int64_t nearest, Cells multiplicities,
                    std::optional<Matrix> mix, Divisors mix_divisors, std::optional<Matrix> measure,
                    Divisors measure_divisors, double scale, std::optional<Addresses> out,
                    std::optional<Array<double, 1>> sq_distances, Array<std::uint8_t, 1> nonfinite) {
  const rk::Rows rows = rows_of(data, offsets, dtype);
  const rk::Select select = select_of(rows, lo, hi, nearest, multiplicities, mix, mix_divisors, measure,
                                      measure_divisors, scale, out, sq_distances, nonfinite);
  nb::gil_scoped_release release;
  rk::cuda::select_columns(rows, select, call_on(device, stream, allocator));
}

void gram(int device, std::uintptr_t stream, nb::callable allocator, Addresses data, Offsets offsets, int dtype,
          Cells multiplicities, bool origin, double scale, bool single, Array<double, 2> out) {
  const rk::Rows rows = rows_of(data, offsets, dtype);
  check_gram(rows, multiplicities, origin, out);
  nb::gil_scoped_release release;
  rk::cuda::gram(rows, multiplicities ? multiplicities->data() : nullptr, origin, scale, single,
                 static_cast<std::int64_t>(out.shape(0)), out.data(), call_on(device, stream, allocator));
}

void row_sq_distances(int device, std::uintptr_t stream, nb::callable allocator, Addresses data, Offsets offsets,
                      int dtype, std::optional<Addresses> centres, double scale, Array<double, 2> out) {
  const rk::Rows rows = rows_of(data, offsets, dtype);
  const rk::Centres from = centres_of(rows, centres, out);
  nb::gil_scoped_release release;
  rk::cuda::row_sq_distances(rows, from, scale, out.data(), call_on(device, stream, allocator));
}

void weighted_row_sum(int device, std::uintptr_t stream, nb::callable allocator, Addresses data, Offsets offsets,
                      int dtype, Matrix weights, Divisors divisors, Addresses out) {
  const rk::Rows rows = rows_of(data, offsets, dtype);
  check_sum(rows, weights, out);
  const double* by = divisors_of(divisors, weights.shape(0));
  nb::gil_scoped_release release;
  rk::cuda::weighted_row_sum(rows, weights.data(), by, static_cast<std::int64_t>(weights.shape(0)), targets(out),
                             call_on(device, stream, allocator));
}

void synchronize(int device, std::uintptr_t stream) {
  nb::gil_scoped_release release;
  rk::cuda::synchronize(device, reinterpret_cast<void*>(stream));
}

nb::list devices() {
  nb::list found;
  for (const rk::cuda::Device& device : rk::cuda::devices()) {
    nb::dict facts;
    facts["name"] = device.name.c_str();
    facts["compute_capability"] = nb::make_tuple(device.major, device.minor);
    facts["multiprocessors"] = device.multiprocessors;
    facts["memory_bytes"] = device.memory_bytes;
    facts["fast_doubles"] = device.fast_doubles;
    found.append(facts);
  }
  return found;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.attr("__version__") = RK_VERSION;
  m.attr("architectures") = RK_CUDA_ARCHITECTURES;
  m.def("devices", &devices);
  m.def("synchronize", &synchronize, "device"_a, "stream"_a);
  m.def("runtime_version", &rk::cuda::runtime_version);
  m.def("driver_version", &rk::cuda::driver_version);
  m.def("select_columns", &select_columns, "device"_a, "stream"_a, "allocate"_a, "data"_a, "offsets"_a, "dtype"_a,
        "lo"_a, "hi"_a, "nearest"_a, "multiplicities"_a.none(), "mix"_a.none(), "mix_divisors"_a.none(),
        "measure"_a.none(), "measure_divisors"_a.none(), "scale"_a, "out"_a.none(), "sq_distances"_a.none(),
        "nonfinite"_a);
  m.def("gram", &gram, "device"_a, "stream"_a, "allocate"_a, "data"_a, "offsets"_a, "dtype"_a,
        "multiplicities"_a.none(), "origin"_a, "scale"_a, "single"_a, "out"_a);
  m.def("row_sq_distances", &row_sq_distances, "device"_a, "stream"_a, "allocate"_a, "data"_a, "offsets"_a, "dtype"_a,
        "centres"_a.none(), "scale"_a, "out"_a);
  m.def("weighted_row_sum", &weighted_row_sum, "device"_a, "stream"_a, "allocate"_a, "data"_a, "offsets"_a, "dtype"_a,
        "weights"_a, "divisors"_a.none(), "out"_a);
#if defined(RK_EMULATED)
  m.def("set_order", &rk::emulation::set_order, "order"_a);
  m.def("fail_launch", &rk::emulation::fail_launch, "nth"_a, "error"_a);
  m.def("launches", &rk::emulation::launches);
  m.def("set_most_blocks", &rk::cuda::set_most_blocks, "blocks"_a);
  m.def("waits", &rk::emulation::waits);
  m.def("set_fast_doubles", &rk::emulation::set_fast_doubles, "fast"_a);
  m.def("set_capturing", &rk::emulation::set_capturing, "capturing"_a);
#endif
}
