// Device code of gram where float64 tensor instructions are fast: products of 8 rows with 8 others over 4 columns at a
// time, exact but for float64's rounding.
#pragma once
#include "gram.cuh"
#include "tensor.cuh"

namespace rk {
namespace cuda {

constexpr int kTensorThreads = 128, kTensorWarps = kTensorThreads / kWarp;
constexpr int kFewRows = 32;                                 // up to which a warp takes all products of its columns
using FewSizes = std::integer_sequence<int, 8, 16, 24, 32>;  // as SortSizes begin

// The values of a thread's column, rows below n, and their lower median, 0 where it is no number; a column that is not
// there is all 0. Notes rows that hold a NaN or Inf, and makes them the median.
template <class S, int N>
struct Column {
  using C = ComputeOf<S>;
  C value[N];
  bool finite;

  // N wires sort up to N rows; one of them may be the origin, which is not read.
  __device__ __forceinline__ Column(const Table& rows, int64_t segment, int64_t column, bool valid) {
    const int n = static_cast<int>(rows.n);
    C check = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = (i < kLeastGramRows<N> - 1 || i < n) && valid ? widened(rows.row<S>(segment, i)[column]) : C{0};
      check = checked(value[i], check);
    }
    finite = check == 0;
  }
  __device__ __forceinline__ C median(const Table& rows, int64_t segment, int64_t column, int low_pads,
                                      unsigned* flags) {
    const int n = static_cast<int>(rows.n);
    if (!finite) {
      for (int i = 0; i < n; ++i)
        if (!is_finite(widened(rows.row<S>(segment, i)[column]))) set_flag(flags, i);
      replace_nan(value);
    }
#pragma unroll
    for (int i = kLeastGramRows<N> - 1; i < N; ++i)
      if (i >= n) value[i] = i < n + low_pads ? -infinity<C>() : infinity<C>();
    sort_wires<Network<N, true>>(value);
    const C middle = value[N / 2 - 1];
    return is_finite(middle) ? middle : C{0};
  }
};

// Adds up what the warps of a block hold of all pairs of row blocks, in their order, and leaves it in memory.
template <int kBlocks>
__device__ __forceinline__ void leave_pairs(const double (&sums)[kBlocks * (kBlocks + 1) / 2][2], double* cells,
                                            int64_t m, double* partial) {
  constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int w = 0; w < kTensorWarps; ++w) {
    __syncthreads();
    if (warp != w) continue;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        double& cell = cells[(pair * kWarp + lane) * 2 + p];
        cell = w == 0 ? sums[pair][p] : cell + sums[pair][p];
      }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kPairs * 2 * kWarp; k += kTensorThreads) {
    const BlockPair at = lower_pair(k / (2 * kWarp));
    const int holder = k / 2 % kWarp;
    const int i = at.i * kSide + holder / kDepth, j = at.j * kSide + 2 * (holder % kDepth) + k % 2;
    if (i < m && j <= i) partial[i * m + j] = cells[k];
  }
}

// All products of up to 32 rows (and origin): every warp has columns of its own.
template <class S, int N>
__global__ void __launch_bounds__(kTensorThreads, sizeof(S) == 8 && N == 32   ? 2
                                                  : sizeof(S) == 8 || N == 32 ? 3
                                                                              : 4) gram_of_few(const GramArgs args) {
#if RK_TENSOR_CODE
  using C = ComputeOf<S>;
  constexpr int kBlocks = N / kSide, kStride = kWarp + kPadding;
  static_assert(sizeof(C) * kTensorWarps * (N + 1) * kStride >= sizeof(double) * kWarp * kBlocks * (kBlocks + 1), "");
  RK_DYNAMIC_SHARED(double, memory);
  const Table& rows = args.rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  C* x = reinterpret_cast<C*>(memory) + warp * (N + 1) * kStride;  // N rows, and what they are centred on
  double sums[kBlocks * (kBlocks + 1) / 2][2] = {};

  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kTensorWarps + warp; t < rows.n_tiles;
       t += static_cast<int64_t>(gridDim.x) * kTensorWarps) {
    const Tile tile = tile_at(rows, t, kWarp);
    const bool valid = lane < tile.count;
    Column<S, N> column(rows, tile.segment, tile.first + lane, valid);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) x[i * kStride + lane] = column.value[i];
    const C centre = column.median(rows, tile.segment, tile.first + lane, args.low_pads, args.flags);
    if (!column.finite)
      for (int i = 0; i < N; ++i)
        if (!is_finite(x[i * kStride + lane])) x[i * kStride + lane] = centre;
    x[N * kStride + lane] = centre;
    __syncwarp();
    const C* mine = x + lane / kDepth * kStride + lane % kDepth;
#pragma unroll 2
    for (int k = 0; k < kWarp; k += kDepth) {
      const double moved = static_cast<double>(x[N * kStride + k + lane % kDepth]) * -args.scale;
      double operand[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        operand[i] = fma(static_cast<double>(mine[i * kSide * kStride + k]), args.scale, moved);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j) multiply_add(sums[i * (i + 1) / 2 + j], operand[i], operand[j]);
    }
  }
  __syncthreads();
  leave_pairs<kBlocks>(sums, memory, args.m, args.partials + blockIdx.x * args.m * args.m);
#endif
}

// Values of a row that a thread reads at once, in consecutive columns. On an H100, 64 rows of float32, 2 take 2.4 reads
// and 4 take 3.2; reading a step ahead gains nothing (2.4), and twice as much at once costs warps that would wait.
template <class S>
constexpr int kOperandColumns = sizeof(S) == 8 ? 2 : 8 / sizeof(S);
constexpr int kPairColumns = 64;  // of a tile
constexpr int kPairRows = 32;     // multiplied with as many others by a warp
constexpr int kPairWarps = 8;     // at most, that read the same columns for different pairs

#if RK_TENSOR_CODE
// What a thread holds of some columns of two tiles of rows, or of one where it is multiplied with itself.
template <class S, bool kDiagonal>
struct PairOperands {
  using C = ComputeOf<S>;
  static constexpr int V = kOperandColumns<S>, kBlocks = kPairRows / kSide, kSides = kDiagonal ? 1 : 2;
  const S *centre, *source[kSides][kBlocks];
  C x[kSides][kBlocks][V], middle[V];

  // call(x, its source, its side, its block) for each row.
  template <class F>
  __device__ __forceinline__ void each(F&& call) {
#pragma unroll
    for (int side = 0; side < kSides; ++side)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) call(x[side][b], source[side][b], side, b);
  }
  __device__ __forceinline__ void point_at(const GramArgs& args, const Tile& tile, const int64_t (&first)[2]) {
    centre = static_cast<const S*>(args.centre[tile.segment]) + tile.first;
    each([&](const C(&)[V], const S*& from, int side, int b) {
      const int64_t i = first[side] + b * kSide;
      from = i < args.rows.n ? args.rows.row<S>(tile.segment, i) + tile.first : nullptr;
    });
  }
  // Reads V columns from c on; `left` of them are there.
  __device__ __forceinline__ void read(int c, int left, bool whole) {
    const auto read_all = [&](auto&& read_one) {
      read_one(middle, centre);
      each([&](C(&values)[V], const S* from, int, int) { read_one(values, from); });
    };
    if (whole)
      read_all([&](C(&values)[V], const S* from) {
        Pack<S, V> pack{};
        if (from) pack = *reinterpret_cast<const Pack<S, V>*>(from + c);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = widened(pack.cell[v]);
      });
    else
      read_all([&](C(&values)[V], const S* from) {
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = from && v < left ? widened(from[c + v]) : C{0};
      });
  }
  // Values that are no numbers are those of the centre, and their rows are flagged.
  __device__ __forceinline__ void clean(unsigned* flags, const int64_t (&first)[2]) {
    C check = 0;
    each([&](const C(&values)[V], const S*, int, int) {
#pragma unroll
      for (int v = 0; v < V; ++v) check = checked(values[v], check);
    });
#pragma unroll
    for (int v = 0; v < V; ++v) middle[v] = is_finite(middle[v]) ? middle[v] : C{0};
    if (check == 0) return;
    each([&](C(&values)[V], const S*, int side, int b) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (!is_finite(values[v])) {
          set_flag(flags, first[side] + b * kSide);
          values[v] = middle[v];
        }
    });
  }
  __device__ __forceinline__ void multiply(double scale, double (&sums)[kBlocks][kBlocks][2]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double moved = static_cast<double>(middle[v]) * -scale;
      double operand[kSides][kBlocks];
#pragma unroll
      for (int side = 0; side < kSides; ++side)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) operand[side][b] = fma(static_cast<double>(x[side][b][v]), scale, moved);
#pragma unroll
      for (int i = 0; i < kBlocks; i += 2)
#pragma unroll
        for (int j = 0; j < (kDiagonal ? i + 2 : kBlocks); ++j)
          multiply_add(sums[i][j], sums[i + 1][j], operand[0][i], operand[0][i + 1], operand[kSides - 1][j]);
    }
  }
};

// A warp's products, over its block's tiles.
template <class S, bool kDiagonal, int kBlocks>
__device__ __forceinline__ void add_pairs(const GramArgs& args, const int64_t (&first)[2],
                                          double (&sums)[kBlocks][kBlocks][2]) {
  constexpr int V = kOperandColumns<S>, kStep = V * kDepth;
  const int quarter = threadIdx.x % kDepth;
  for (int64_t t = blockIdx.x; t < args.rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(args.rows, t, kPairColumns);
    PairOperands<S, kDiagonal> operands;
    operands.point_at(args, tile, first);
#pragma unroll 1
    for (int c = quarter * V; c - quarter * V < tile.count; c += kStep) {
      operands.read(c, tile.count - c, args.vectorised && c + V <= tile.count);
      operands.clean(args.flags, first);
      __syncwarp();
      operands.multiply(args.scale, sums);
    }
  }
}
#endif

// Products of two tiles of 32 rows, centred on what is in memory: every warp has a pair of the lower triangle of tiles,
// and the warps of a block the same columns, so that all but one find them in the cache.
template <class S>
__global__ void __launch_bounds__(kPairWarps* kWarp, 1) gram_of_pairs(const GramArgs args) {
#if RK_TENSOR_CODE
  constexpr int kBlocks = kPairRows / kSide;
  const int lane = threadIdx.x % kWarp, row = lane / kDepth, quarter = lane % kDepth;
  const int pair = args.first_pair + static_cast<int>(blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp);
  if (pair >= args.pairs) return;
  const BlockPair tiles = lower_pair(pair, args.line_tiles);
  const int64_t upper = int64_t{tiles.i} * kPairRows, lower = int64_t{tiles.j} * kPairRows;
  const int64_t first[2] = {upper + row, lower + row};  // of this thread's rows
  double sums[kBlocks][kBlocks][2] = {};
  if (tiles.i == tiles.j)
    add_pairs<S, true>(args, first, sums);
  else
    add_pairs<S, false>(args, first, sums);

  double* partial = args.partials + blockIdx.x * args.m * args.m;
#pragma unroll
  for (int a = 0; a < kBlocks; ++a)
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int64_t i = upper + a * kSide + row, j = lower + b * kSide + 2 * quarter + p;
        if (i < args.m && j <= i) partial[i * args.m + j] = sums[a][b][p];
      }
#endif
}

}  // namespace cuda
}  // namespace rk
