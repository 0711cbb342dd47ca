// gram on a GPU: one kernel for up to 64 rows, which finds their median on the way; for more, and for rows of different
// weight, the median first, and then the products of every pair of tiles of 64 rows.
#include <cmath>

#include "gram.cuh"
#include "launch.h"

namespace rk {
namespace cuda {
namespace {

constexpr double kLeastSquare = 0x1p-100;  // mean square of a row's columns; even flushed to zero 2^-126 is little
constexpr std::size_t kSharedBytes = 48 << 10;

// Products in P: float64, or float32 where the result may have entries that overflowed, or lost digits because squares
// are subnormal; false then.
template <class S, class P>
bool products(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, double* out, Queue& queue) {
  const int64_t n = rows.n, m = n + (origin ? 1 : 0);
  const bool fused = m <= kTileRows && !multiplicities;
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  const int64_t blocks_of_tile = ((m < kTileRows ? m : kTileRows) + kBlockRows - 1) / kBlockRows;
  const int64_t held = (tiles > 1 ? 2 * kTileRows : blocks_of_tile * kBlockRows);
  int width = 128;
  while (static_cast<std::size_t>(held * (width + 1)) * sizeof(P) > kSharedBytes) width /= 2;
  const std::size_t reduced = kGramThreads * kCells * sizeof(double);
  const std::size_t tile_bytes = static_cast<std::size_t>(held * (width + 1)) * sizeof(P);
  const int64_t pairs = tiles > 1 ? kGramThreads : blocks_of_tile * (blocks_of_tile + 1) / 2;
  int slices = 1;
  while (2 * slices * pairs <= kGramThreads) slices *= 2;

  Workspace space;
  const auto flags = space.zeros<unsigned>(n);
  const auto sums = space.zeros<double>(m * m);
  const UploadedRows uploaded(space, rows, width);
  const int64_t blocks = summing_blocks(uploaded.n_tiles(), m * m, int64_t{1} << 22, 4, 1024);
  const auto partials = space.zeros<double>(blocks * m * m);
  const auto centre = space.scratch<S>(fused ? 0 : rows.columns());
  const auto centre_rows = space.pointers(fused ? 0 : rows.n_segments);
  space.allocate(queue);
  if (!fused) {
    std::vector<void*> targets;
    for (int64_t s = 0; s < rows.n_segments; ++s) {
      space.point(Part<const void*>{centre_rows.at + static_cast<std::size_t>(s) * sizeof(void*)},
                  Part<S>{centre.at + static_cast<std::size_t>(rows.offsets[s]) * sizeof(S)}, 0, 1);
      targets.push_back(space[centre] + rows.offsets[s]);
    }
    lower_median_of(rows, multiplicities, targets.data(), queue);
  }
  space.send(queue);
  if (blocks > 0) {
    GramArgs args{};
    args.rows = uploaded.table();
    args.centre = fused ? nullptr : space[centre_rows];
    args.m = m;
    args.scale = scale;
    args.partials = space[partials];
    args.flags = space[flags];
    args.width = width;
    args.slices = slices;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles * (tiles + 1) / 2));
    const auto launch = [&](auto* kernel) {
      queue.launch("gram_products", kernel, grid, dim3(kGramThreads), tile_bytes > reduced ? tile_bytes : reduced,
                   args);
    };
    if (fused)
      by_network_size(GramSizes{}, n, [&](auto size) {
        constexpr int N = decltype(size)::value;
        args.low_pads = median_pads(N, n);
        launch(&gram_products<S, P, N>);
      });
    else
      launch(&gram_products<S, P, 0>);
    add_partials(queue, space[partials], blocks, m * m, space[sums]);
  }
  const char* begin = reinterpret_cast<const char*>(space[flags]);
  const auto bytes = static_cast<std::size_t>(reinterpret_cast<const char*>(space[sums] + m * m) - begin);
  std::vector<char> found(bytes);
  queue.download(found.data(), begin, bytes, "gram");
  const char* entries = found.data() + (bytes - static_cast<std::size_t>(m * m) * sizeof(double));
  const auto is_bad = [&](int64_t i) {
    unsigned flag = 0;
    if (i < n) std::memcpy(&flag, found.data() + i * static_cast<int64_t>(sizeof(flag)), sizeof(flag));
    return flag != 0;
  };
  bool kept_digits = true;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum;
      std::memcpy(&sum, entries + (i * m + j) * static_cast<int64_t>(sizeof(sum)), sizeof(sum));
      if (is_bad(i) || is_bad(j))
        sum = std::nan("");
      else if (i == j)
        kept_digits &= sum - sum == 0 && sum >= kLeastSquare * static_cast<double>(rows.columns());
      out[i * m + j] = out[j * m + i] = sum;
    }
  return kept_digits;
}

}  // namespace

void gram(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, bool single, double* out,
          const Call& call) {
  Queue queue(rows, call);
  by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (sizeof(S) < 8)
      if (single && scale == 1 && products<S, float>(rows, multiplicities, origin, scale, out, queue)) return;
    products<S, double>(rows, multiplicities, origin, scale, out, queue);
  });
}

}  // namespace cuda
}  // namespace rk
