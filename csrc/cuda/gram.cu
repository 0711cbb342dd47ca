// gram on a GPU: one kernel for up to 64 rows, which finds their median on the way; for more, and for rows of different
// weight, the median first, and then the products of every pair of tiles of 64 rows. By tensor instructions where those
// of float64 are fast.
#include <cmath>

#include "gram.cuh"
#include "launch.h"
#include "tensor_gram.cuh"

namespace rk {
namespace cuda {
namespace {

constexpr std::size_t kSharedBytes = 48 << 10;
constexpr int64_t kMostGroups = 65535;  // of pairs in a launch

// How the products of a shape are taken.
struct Plan {
  bool fused;           // one kernel finds the median on the way
  int tile_rows;        // multiplied with as many others
  int width;            // columns of a tile
  int64_t sharing = 1;  // tiles that a block takes at once
  int64_t pairs_of_block = 1, all_sums = int64_t{1} << 22, most_blocks = 1024;
  int threads = kGramThreads, slices = 1;  // see GramArgs
  std::size_t shared_bytes = 0;
};

template <class S>
Plan tensor_plan(int64_t m, bool weighted) {
  Plan how{};
  how.threads = kTensorThreads;
  if (m <= kFewRows && !weighted) {
    how.fused = true;
    how.tile_rows = kFewRows;
    how.width = kWarp;
    how.sharing = kTensorWarps;
    const int64_t rows = (m + kSide - 1) / kSide * kSide + 1;
    how.shared_bytes = static_cast<std::size_t>(kTensorWarps * rows * (kWarp + kPadding)) * sizeof(ComputeOf<S>);
    return how;
  }
  how.tile_rows = kPairRows;
  how.width = kPairColumns;
  how.all_sums = int64_t{1} << 23;
  how.most_blocks = 2048;
  const int64_t tiles = tiles_of(m, kPairRows), pairs = tiles * (tiles + 1) / 2;
  how.pairs_of_block = tiles_of(pairs, static_cast<int>(tiles_of(pairs, kPairWarps)));
  how.threads = static_cast<int>(how.pairs_of_block) * kWarp;
  return how;
}

template <class P>
Plan plan(int64_t m, bool weighted) {
  Plan how{};
  how.fused = m <= kTileRows && !weighted;
  how.tile_rows = kTileRows;
  how.width = 128;
  const int64_t blocks = ((m < kTileRows ? m : kTileRows) + kBlockRows - 1) / kBlockRows;
  const int64_t held = m > kTileRows ? 2 * kTileRows : blocks * kBlockRows;
  const int64_t pairs = m > kTileRows ? kGramThreads : blocks * (blocks + 1) / 2;
  while (static_cast<std::size_t>(held * (how.width + 1)) * sizeof(P) > kSharedBytes) how.width /= 2;
  while (2 * how.slices * pairs <= kGramThreads) how.slices *= 2;
  const std::size_t tile = static_cast<std::size_t>(held * (how.width + 1)) * sizeof(P);
  const std::size_t reduced = kGramThreads * kCells * sizeof(double);
  how.shared_bytes = tile > reduced ? tile : reduced;
  return how;
}

// Launches the kernel of the plan, in as many parts as its pairs of tiles take.
template <class S, class P>
void launch_products(const Plan& how, bool tensor, int64_t n, int64_t blocks, GramArgs args, Queue& queue) {
  const auto launch = [&](const char* name, auto* kernel) {
    const int64_t most = lesser(kMostGroups, most_blocks) * how.pairs_of_block;
    for (int64_t first = 0; first < args.pairs; first += most) {
      args.first_pair = static_cast<int>(first);
      const int64_t groups = (lesser(most, args.pairs - first) + how.pairs_of_block - 1) / how.pairs_of_block;
      queue.launch(name, kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)),
                   dim3(static_cast<unsigned>(how.threads)), how.shared_bytes, args);
    }
  };
  if (sizeof(P) == 8 && tensor) {
    if (how.fused)
      by_size(FewSizes{}, args.m, [&](auto size) {
        constexpr int N = decltype(size)::value;
        args.low_pads = median_pads(N, n);
        launch("gram_of_few", &gram_of_few<S, N>);
      });
    else
      launch("gram_of_pairs", &gram_of_pairs<S>);
  } else if (how.fused) {
    by_size(GramSizes{}, n, [&](auto size) {
      constexpr int N = decltype(size)::value;
      args.low_pads = median_pads(N, n);
      launch("gram_products", &gram_products<S, P, N>);
    });
  } else {
    launch("gram_products", &gram_products<S, P, 0>);
  }
}

// Brings the sums of the lower triangle back, and NaN where a row's flag is set.
void bring_back(const Workspace& space, Part<unsigned> flags, Part<double> sums, int64_t n, int64_t m, int64_t lines,
                double* out, Queue& queue) {
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
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j <= i && j < lines; ++j) {
      double sum;
      std::memcpy(&sum, entries + (i * m + j) * static_cast<int64_t>(sizeof(sum)), sizeof(sum));
      if (is_bad(i) || is_bad(j)) sum = std::nan("");
      out[j * m + i] = sum;
      if (i < lines) out[i * m + j] = sum;
    }
}

// Products in P: float64, or float32. `tensor`: by tensor instructions for float64.
template <class S, class P>
void products(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, bool tensor, int64_t lines,
              double* out, Queue& queue) {
  const int64_t n = rows.n, m = n + (origin ? 1 : 0);
  const Plan how = tensor ? tensor_plan<S>(m, multiplicities != nullptr) : plan<P>(m, multiplicities != nullptr);
  const int64_t tiles = tiles_of(m, how.tile_rows), line_tiles = tiles_of(lines, how.tile_rows);
  const int64_t pairs = line_tiles * (line_tiles + 1) / 2 + (tiles - line_tiles) * line_tiles;
  const int64_t lone = lone_row(multiplicities, n);

  Workspace space;
  const auto flags = space.zeros<unsigned>(n);
  const auto sums = space.zeros<double>(m * m);
  const UploadedRows uploaded(space, rows, how.width);
  const int64_t blocks = summing_blocks(tiles_of(uploaded.n_tiles(), static_cast<int>(how.sharing)), m * m,
                                        how.all_sums, 4, how.most_blocks);
  const auto partials = space.zeros<double>(blocks * m * m);
  constexpr int64_t kAligned = 16 / sizeof(S);  // every segment's centre begins at a multiple of 16 bytes
  const auto centre = space.scratch<S>(how.fused || lone >= 0 ? 0 : rows.columns() + rows.n_segments * kAligned);
  std::vector<const void*> lone_centre;  // that row itself
  if (lone >= 0)
    for (int64_t s = 0; s < rows.n_segments; ++s) lone_centre.push_back(rows.data[s * n + lone]);
  const auto centre_rows =
      lone >= 0 ? space.upload(lone_centre.data(), rows.n_segments) : space.pointers(how.fused ? 0 : rows.n_segments);
  space.allocate(queue);
  if (!how.fused && lone < 0) {
    std::vector<void*> targets;
    for (int64_t s = 0; s < rows.n_segments; ++s) {
      const int64_t at = (rows.offsets[s] + kAligned - 1) / kAligned * kAligned + s * kAligned;
      space.point(Part<const void*>{centre_rows.at + static_cast<std::size_t>(s) * sizeof(void*)},
                  Part<S>{centre.at + static_cast<std::size_t>(at) * sizeof(S)}, 0, 1);
      targets.push_back(space[centre] + at);
    }
    lower_median_of(rows, multiplicities, targets.data(), queue);
  }
  space.send(queue);
  if (blocks > 0) {
    GramArgs args{};
    args.rows = uploaded.table();
    args.centre = how.fused ? nullptr : space[centre_rows];
    args.m = m;
    args.scale = scale;
    args.partials = space[partials];
    args.flags = space[flags];
    args.line_tiles = static_cast<short>(line_tiles);
    args.pairs = static_cast<int>(pairs);
    args.width = how.width;
    args.slices = how.slices;
    args.vectorised = all_aligned(rows.data, rows.n_segments * n);
    launch_products<S, P>(how, tensor, n, blocks, args, queue);
    add_partials(queue, space[partials], blocks, m * m, space[sums]);
  }
  bring_back(space, flags, sums, n, m, lines, out, queue);
}

}  // namespace

void gram(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, bool single, int64_t lines,
          double* out, const Call& call) {
  Queue queue(rows, call);
  const bool tensor = has_fast_doubles(call.device);
  by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (sizeof(S) < 8)
      if (single && !tensor && scale == 1)
        return products<S, float>(rows, multiplicities, origin, scale, false, lines, out, queue);
    products<S, double>(rows, multiplicities, origin, scale, tensor, lines, out, queue);
  });
}

}  // namespace cuda
}  // namespace rk
