// weighted_row_sum and row_sq_distances on a GPU; and which devices there are.
#include "launch.h"

namespace rk {
namespace cuda {

void weighted_row_sum(const Rows& rows, const double* weights, const double* divisors, int64_t k, void* const* out,
                      const Call& call) {
  Queue queue(rows, call);
  if (rows.columns() == 0) return;
  by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    Workspace space;
    const UploadedRows uploaded(space, rows, kSumColumns<S, 1> * kSumThreads);
    const UploadedWeights uploaded_weights(space, weights, divisors, k, rows.n, rows.dtype, 1);
    const auto targets = space.upload(out, rows.n_segments * k);
    space.allocate(queue);
    space.send(queue);
    const bool aligned = all_aligned(rows.data, rows.n_segments * rows.n) && all_aligned(out, rows.n_segments * k);
    queue.launch("weighted_sums", &weighted_sums<S, S, 1>, dim3(grid_for(uploaded.n_tiles()), static_cast<unsigned>(k)),
                 dim3(kSumThreads), 0, uploaded.table(), uploaded_weights.on_device(space), space[targets], aligned);
  });
}

void row_sq_distances(const Rows& rows, const Centres& centres, double scale, double* out, const Call& call) {
  Queue queue(rows, call);
  const int64_t n = rows.n, count = centres.count * n;
  for (int64_t at = 0; at < count; ++at) out[at] = 0;
  if (rows.columns() == 0) return;
  by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    Workspace space;
    const UploadedRows uploaded(space, rows, kDoubledColumns);
    std::vector<const void*> pointers;  // segment after segment of each centre
    for (int64_t c = 0; centres.data && c < centres.count; ++c)
      for (int64_t s = 0; s < rows.n_segments; ++s) pointers.push_back(centres.data[s * centres.count + c]);
    const auto centre_rows = space.upload(pointers.data(), static_cast<int64_t>(pointers.size()));
    const int64_t blocks = summing_blocks(uploaded.n_tiles(), 2 * n);
    const auto partials = space.scratch<DoubledSum>(blocks * n);
    const auto sums = space.scratch<double>(count);
    space.allocate(queue);
    space.send(queue);
    for (int64_t c = 0; c < centres.count; ++c) {
      const void* const* centre = centres.data ? space[centre_rows] + c * rows.n_segments : nullptr;
      queue.launch("row_sq_distances_of", &row_sq_distances_of<S>, dim3(grid_for(blocks), static_cast<unsigned>(n)),
                   dim3(kSumThreads), 0, uploaded.table(), centre, scale, space[partials]);
      queue.launch("add_doubled_blocks", &add_doubled_blocks<double>, dim3(static_cast<unsigned>(tiles_of(n, kWarp))),
                   dim3(kAddThreads), 0, space[partials], blocks, n, space[sums] + c * n);
    }
    queue.download(out, space[sums], static_cast<std::size_t>(count) * sizeof(double), "row_sq_distances");
  });
}

void synchronize(int device, void* stream) {
  const std::int64_t no_columns[] = {0};
  const Rows none{nullptr, no_columns, 0, 0, DType::float32};
  const Call call{device, stream, nullptr, nullptr};
  Queue(none, call).download(nullptr, nullptr, 0, "waiting for the stream");
}

void set_most_blocks(std::int64_t blocks) { most_blocks = blocks; }

bool has_fast_doubles(int device) {
  int major = 0, ratio = 0;  // of the rate of float32 to that of float64
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8 &&
         major <= 10 &&
         cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device) == cudaSuccess &&
         ratio <= 4;
}

std::vector<Device> devices() {
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess)
      throw Error(std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")");
  };
  int count = 0;
  check(cudaGetDeviceCount(&count));
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index));
    found.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                     properties.totalGlobalMem, has_fast_doubles(index)});
  }
  return found;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}
int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

}  // namespace cuda
}  // namespace rk
