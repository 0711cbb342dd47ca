// select_columns among mixtures on a GPU with fast float64: in one kernel over all segments.
#include "launch.h"
#include "mixed.cuh"

namespace rk {
namespace cuda {
namespace {

constexpr int64_t kMostMixed = 64;
constexpr std::size_t kUnasked = 48 << 10;
using MixedSizes = std::integer_sequence<int, 16, 32, 64>;

template <class S, int N, bool kMedian>
void launch_mixed(Queue& queue, const Selection& args, const Mixtures& mix) {
  const auto kernel = &select_mixed_rows<S, N, kMedian>;
  const std::size_t bytes = static_cast<std::size_t>(N) * static_cast<std::size_t>(mix.stride) * sizeof(double) +
                            sizeof(float) * kMixWarps * N * (kWarp + 1);
  if (bytes > kUnasked) queue.allow_shared_bytes("select_mixed_rows", kernel, bytes);
  const int64_t blocks = lesser(grid_for(tiles_of(args.rows.n_tiles, kMixWarps)), 4096);
  queue.launch("select_mixed_rows", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMixThreads), bytes, args, mix);
}

}  // namespace

bool mixes_by_network(const Rows& rows, const Select& select, int device) {
  return select.mix && select.out && !select.sq_distances && !select.multiplicities && rows.dtype != DType::float64 &&
         rows.n <= kMostMixed && select.n_mixed <= kMostMixed && has_fast_doubles(device);
}

void select_mixed_by_network(const Rows& rows, const Select& select, Queue& queue) {
  const int64_t n = rows.n, k = select.n_mixed;
  Workspace space;
  const auto flags = space.zeros<unsigned>(n);
  const UploadedRows uploaded(space, rows, kWarp);
  const auto out = space.upload(select.out, rows.n_segments);
  Mixtures mix{};
  mix.k = static_cast<int>(k);
  mix.stride = mix_stride(static_cast<int>(n));
  std::vector<double> weights(static_cast<std::size_t>(kMostMixed * mix.stride));
  std::vector<unsigned> used(static_cast<std::size_t>(n));
  std::vector<Average> averages;
  for (int64_t r = 0; r < k; ++r) {
    averages.push_back(average_of(select.mix + r * n, n, select.mix_divisors ? select.mix_divisors[r] : 1));
    for (int64_t i = 0; i < n; ++i) {
      const double weight = select.mix[r * n + i];
      weights[static_cast<std::size_t>(r * mix.stride + i)] = weight * averages.back().lift;
      used[static_cast<std::size_t>(i)] |= weight != 0;
    }
  }
  const auto weights_at = space.upload(weights.data(), static_cast<int64_t>(weights.size()));
  const auto used_at = space.upload(used.data(), n);
  const auto averages_at = space.upload(averages.data(), k);
  space.allocate(queue);
  space.send(queue);
  mix.weights = space[weights_at];
  mix.used = space[used_at];
  mix.averages = space[averages_at];
  Selection args = selection_of(select);
  args.rows = uploaded.table();
  args.out = space[out];
  args.flags = space[flags];
  args.vectorised = all_aligned(rows.data, rows.n_segments * n);
  if (uploaded.n_tiles() > 0)
    by_dtype(rows.dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(S) < 8)
        by_size(MixedSizes{}, k, [&](auto size) {
          constexpr int N = decltype(size)::value;
          if (is_median(select, k)) {
            args.low_pads = median_pads(N, k);
            launch_mixed<S, N, true>(queue, args, mix);
          } else {
            launch_mixed<S, N, false>(queue, args, mix);
          }
        });
    });
  std::vector<unsigned> found(static_cast<std::size_t>(n));
  queue.download(found.data(), space[flags], found.size() * sizeof(unsigned), "select_columns");
  for (int64_t i = 0; i < n; ++i) select.nonfinite[i] |= found[static_cast<std::size_t>(i)] != 0;
}

}  // namespace cuda
}  // namespace rk
