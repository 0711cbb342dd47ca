// Device code of gram: rows centred on their lower median in shared memory, then multiplied 4 x 4 rows at a time, every
// thread with a pair of such blocks and a share of the columns.
#pragma once
#include "network.cuh"

namespace rk {
namespace cuda {

constexpr int kGramThreads = 256;
constexpr int kTileRows = 64;  // rows multiplied with up to as many others by one block of threads
constexpr int kBlockRows = 4;  // of a register tile
constexpr int kCells = kBlockRows * kBlockRows;
constexpr int kSingleRun = 32;  // float32 products summed before they go to a float64 sum: the contract's error bound

using GramSizes = SortSizes;
template <int N>
constexpr int kLeastGramRows = least_rows(N, GramSizes{});

struct GramArgs {
  Table rows;                 // n rows; where there is an origin, row n is it
  const void* const* centre;  // (n_segments) in the storage type; null where the kernel finds it itself
  int64_t m;                  // rows and origin
  double scale;
  double* partials;  // (blocks, m, m), lower triangle
  unsigned* flags;
  int first_pair;    // of tiles, in this launch
  int pairs;         // of tiles, in all
  bool vectorised;   // rows and centre are aligned to 16 bytes
  short line_tiles;  // of the first rows, with which all are multiplied; short, for 8 bytes more made registers spill
  int width;         // columns of a tile
  int slices;        // that share the columns of a pair of blocks: a power of two
  int low_pads;
};

// Pairs of blocks of rows: i >= j of one tile, or all of two.
struct BlockPair {
  int i, j;
};
__device__ __forceinline__ BlockPair lower_pair(int index) {
  int i = 0;
  while (index > i) index -= ++i;
  return {i, index};
}
// Of those whose second is below `most`.
__device__ __forceinline__ BlockPair lower_pair(int index, int most) {
  const int whole = most * (most + 1) / 2;
  return index < whole ? lower_pair(index) : BlockPair{most + (index - whole) / most, (index - whole) % most};
}

template <class P>
__device__ __forceinline__ P centred(float x, float centre, double scale) {
  if constexpr (sizeof(P) == 4)
    return x - centre;  // there is no scale
  else
    return fma(static_cast<double>(x), scale, static_cast<double>(centre) * -scale);
}
template <class P>
__device__ __forceinline__ P centred(double x, double centre, double scale) {
  return fma(x, scale, centre * -scale);
}

// The sum of some columns of a pair of blocks; float32 products in short runs.
__device__ __forceinline__ void add_products(const float* a, const float* b, int stride, int first, int columns,
                                             int step, double (&sums)[kCells]) {
  for (int begin = first; begin < columns; begin += kSingleRun * step) {
    const int end = begin + kSingleRun * step < columns ? begin + kSingleRun * step : columns;
    float run[kCells] = {};
    for (int c = begin; c < end; c += step) {
      float left[kBlockRows], right[kBlockRows];
#pragma unroll
      for (int k = 0; k < kBlockRows; ++k) {
        left[k] = a[k * stride + c];
        right[k] = b[k * stride + c];
      }
#pragma unroll
      for (int k = 0; k < kCells; ++k) run[k] = fmaf(left[k / kBlockRows], right[k % kBlockRows], run[k]);
    }
#pragma unroll
    for (int k = 0; k < kCells; ++k) sums[k] += static_cast<double>(run[k]);
  }
}
__device__ __forceinline__ void add_products(const double* a, const double* b, int stride, int first, int columns,
                                             int step, double (&sums)[kCells]) {
  for (int c = first; c < columns; c += step) {
    double left[kBlockRows], right[kBlockRows];
#pragma unroll
    for (int k = 0; k < kBlockRows; ++k) {
      left[k] = a[k * stride + c];
      right[k] = b[k * stride + c];
    }
#pragma unroll
    for (int k = 0; k < kCells; ++k) sums[k] = fma(left[k / kBlockRows], right[k % kBlockRows], sums[k]);
  }
}

// The column-wise lower median of up to N rows, 0 where it is no number. Notes rows that hold a NaN or Inf.
template <class S, int N>
__device__ ComputeOf<S> lower_median(const Table& rows, const Tile& tile, int64_t column, int low_pads,
                                     unsigned* flags) {
  using C = ComputeOf<S>;
  const int n = static_cast<int>(rows.n);
  C x[1][N], check = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < kLeastGramRows<N> || i < n) {
      x[0][i] = widened(rows.row<S>(tile.segment, i)[column]);
      check = checked(x[0][i], check);
    } else {
      x[0][i] = i < n + low_pads ? -infinity<C>() : infinity<C>();
    }
  }
  if (check != 0) {
    for (int i = 0; i < n; ++i)  // not set_flag: there is no register left to look first
      if (!is_finite(widened(rows.row<S>(tile.segment, i)[column]))) atomicOr(flags + i, 1u);
    replace_nan(x[0]);
  }
  sort_wires<Network<N, true>>(x[0]);
  const C median = x[0][N / 2 - 1];
  return is_finite(median) ? median : C{0};
}

// Two tiles of rows, or one with itself, that a block of threads multiplies: the rows of the first, filled up to whole
// blocks with zeros, then those of the second.
struct TilesOfRows {
  BlockPair tiles;
  bool diagonal;
  int upper, lower, upper_blocks, lower_blocks, pairs;  // of blocks

  __device__ __forceinline__ TilesOfRows(BlockPair pair, int64_t m) : tiles(pair), diagonal(pair.i == pair.j) {
    const auto count_of = [&](int tile) {
      const int64_t left = m - static_cast<int64_t>(tile) * kTileRows;
      return static_cast<int>(left < kTileRows ? left : kTileRows);
    };
    upper = count_of(tiles.i);
    lower = diagonal ? 0 : count_of(tiles.j);
    upper_blocks = (upper + kBlockRows - 1) / kBlockRows;
    lower_blocks = (lower + kBlockRows - 1) / kBlockRows;
    pairs = diagonal ? upper_blocks * (upper_blocks + 1) / 2 : upper_blocks * lower_blocks;
  }
  __device__ __forceinline__ int held() const { return (upper_blocks + lower_blocks) * kBlockRows; }
  __device__ __forceinline__ int64_t row_at(int r) const {  // -1: none
    if (r < upper) return static_cast<int64_t>(tiles.i) * kTileRows + r;
    r -= upper_blocks * kBlockRows;
    return r >= 0 && r < lower ? static_cast<int64_t>(tiles.j) * kTileRows + r : -1;
  }
  // Adds the slices of each pair of blocks in their order, from the threads' sums.
  __device__ __forceinline__ void leave(const double (&sums)[kCells], double* cells, const GramArgs& args) const {
    const int thread = threadIdx.x;
#pragma unroll
    for (int k = 0; k < kCells; ++k) cells[k * kGramThreads + thread] = sums[k];
    __syncthreads();
    double* partial = args.partials + blockIdx.x * args.m * args.m;
    for (int k = thread; k < pairs * kCells; k += kGramThreads) {
      const int which = k / kCells, cell = k % kCells;
      const BlockPair at = diagonal ? lower_pair(which) : BlockPair{which / lower_blocks, which % lower_blocks};
      const int p = at.i * kBlockRows + cell / kBlockRows, q = at.j * kBlockRows + cell % kBlockRows;
      if (p >= upper || q >= (diagonal ? upper : lower)) continue;
      double sum = 0;
      for (int s = 0; s < args.slices; ++s) sum += cells[cell * kGramThreads + which * args.slices + s];
      const int64_t i = static_cast<int64_t>(tiles.i) * kTileRows + p;
      const int64_t j = static_cast<int64_t>(tiles.j) * kTileRows + q;
      if (i >= j) partial[i * args.m + j] = sum;
    }
  }
};

// Products of two tiles of rows, blockIdx.y of the lower triangle of such pairs. N > 0: one tile of up to N rows, whose
// median is found on the way.
template <class S, class P, int N>
__global__ void __launch_bounds__(kGramThreads, sizeof(S) == 8 ? 1 : 2) gram_products(const GramArgs args) {
  using C = ComputeOf<S>;
  RK_DYNAMIC_SHARED(double, memory);
  P* x = reinterpret_cast<P*>(memory);
  const Table& rows = args.rows;
  const int which = args.first_pair + static_cast<int>(blockIdx.y);
  const TilesOfRows both(N > 0 ? lower_pair(which) : lower_pair(which, args.line_tiles), args.m);
  const int thread = threadIdx.x, stride = args.width + 1;  // no power of two: rows fall into different banks
  const int slice = thread % args.slices, pair = thread / args.slices,
            beside = both.lower_blocks ? both.lower_blocks : 1;
  const BlockPair blocks = both.diagonal ? lower_pair(pair) : BlockPair{pair / beside, pair % beside};
  double sums[kCells] = {};

  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, args.width);
    __syncthreads();
    const auto put = [&](int r, int c, C centre) {
      const int64_t i = both.row_at(r);
      C value = i >= 0 && i < rows.n ? widened(rows.row<S>(tile.segment, i)[tile.first + c]) : C{0};
      if (!is_finite(value)) {
        if (N == 0) set_flag(args.flags, i);
        value = centre;
      }
      x[r * stride + c] = i >= 0 ? centred<P>(value, centre, args.scale) : P{0};
    };
    if constexpr (N > 0) {
      // A thread a column: what it has just read comes from the cache when it is read again.
      if (thread < tile.count) {
        const C centre = lower_median<S, N>(rows, tile, tile.first + thread, args.low_pads, args.flags);
        for (int r = 0; r < both.held(); ++r) put(r, thread, centre);
      }
    } else {
      const S* centre = static_cast<const S*>(args.centre[tile.segment]) + tile.first;
      const int lane = thread % kWarp;
      for (int r = thread / kWarp; r < both.held(); r += kGramThreads / kWarp)
        for (int c = lane; c < tile.count; c += kWarp) {
          const C middle = widened(centre[c]);
          put(r, c, is_finite(middle) ? middle : C{0});
        }
    }
    __syncthreads();
    if (pair < both.pairs)
      add_products(x + blocks.i * kBlockRows * stride,
                   x + (blocks.j + (both.diagonal ? 0 : both.upper_blocks)) * kBlockRows * stride, stride, slice,
                   tile.count, args.slices, sums);
  }

  __syncthreads();
  both.leave(sums, memory, args);
}

}  // namespace cuda
}  // namespace rk
