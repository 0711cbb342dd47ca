// Device code of selections among mixtures where float64 tensor instructions are fast: a warp mixes 32 columns of up to
// 64 rows of 16 or 32 bits, and each of its threads selects in one of them; rows are read once.
#pragma once
#include "select.cuh"
#include "tensor.cuh"

namespace rk {
namespace cuda {

constexpr int kMixThreads = 128, kMixWarps = kMixThreads / kWarp;

// The mixtures, as they are multiplied.
struct Mixtures {
  const double* weights;    // (rounded up to N, stride), lifted, and 0 where there is no mixture or row
  const Average* averages;  // (k)
  const unsigned* used;     // (n) whether any mixture takes the row
  int k, stride;
};
constexpr int kMixSteps = 4;  // operands of rows that are read together
constexpr int mix_stride(int n) {
  return (n + kMixSteps * kDepth - 1) / (kMixSteps * kDepth) * (kMixSteps * kDepth) + kPadding;
}

template <int N>
constexpr int kMixColumns = N > 32 ? 2 : 4;  // that a thread reads of a row at once

#if RK_TENSOR_CODE
// What a thread holds of V columns, in every fourth row, while a warp mixes V * 8.
template <class S, int N>
struct MixOperands {
  static constexpr int V = kMixColumns<N>, kBlocks = N / kSide;
  const Table& rows;
  int64_t segment, column;
  int left;  // columns that are there
  bool whole;
  float x[kMixSteps][V];

  // From a column of a tile on.
  __device__ __forceinline__ MixOperands(const Selection& selection, const Tile& tile, int at)
      : rows(selection.rows),
        segment(tile.segment),
        column(tile.first + at),
        left(tile.count - at),
        whole(selection.vectorised && left >= V) {}
  // call(x, its row) for the rows from `first` on.
  template <class F>
  __device__ __forceinline__ void each(int first, F&& call) {
#pragma unroll
    for (int step = 0; step < kMixSteps; ++step)
      call(x[step], first + step * kDepth + static_cast<int>(threadIdx.x) % kDepth);
  }
  __device__ __forceinline__ void read(int first) {
    const int n = static_cast<int>(rows.n);
    if (whole)
      each(first, [&](float (&values)[V], int i) {
        Pack<S, V> pack{};
        if (i < n) pack = *reinterpret_cast<const Pack<S, V>*>(rows.row<S>(segment, i) + column);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = widened(pack.cell[v]);
      });
    else
      each(first, [&](float (&values)[V], int i) {
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = i < n && v < left ? widened(rows.row<S>(segment, i)[column + v]) : 0.0f;
      });
  }
  // Values that are no numbers are 0, and their rows are flagged; returns whether a mixture takes one of these.
  __device__ __forceinline__ bool clean(int first, unsigned* flags, const unsigned* used) {
    float check = 0;
    each(first, [&](const float (&values)[V], int) {
#pragma unroll
      for (int v = 0; v < V; ++v) check = checked(values[v], check);
    });
    bool taken = false;
    if (check != 0)
      each(first, [&](float (&values)[V], int i) {
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (!is_finite(values[v])) {
            set_flag(flags, i);
            taken |= used[i] != 0;
            values[v] = 0.0f;
          }
      });
    return taken;
  }
  // `weights` are this thread's of the rows from the first on.
  __device__ __forceinline__ void multiply(const double* weights, int stride, double (&sums)[V][kBlocks][2]) const {
#pragma unroll
    for (int step = 0; step < kMixSteps; ++step)
#pragma unroll
      for (int b = 0; b < kBlocks; b += 2) {
        const double* weight = weights + b * kSide * stride + step * kDepth;
        const double upper = weight[0], lower = weight[kSide * stride];
#pragma unroll
        for (int v = 0; v < V; ++v)
          multiply_add(sums[v][b], sums[v][b + 1], upper, lower, static_cast<double>(x[step][v]));
      }
  }
};

// Mixes the columns of a tile into `mixed`, (N, kStride); returns whether this thread met a value that is no number and
// that a mixture takes.
template <class S, int N, int kStride>
__device__ __forceinline__ bool mix_tile(const Selection& selection, const Mixtures& mix, const double* weights,
                                         const Tile& tile, float* mixed) {
  using Operands = MixOperands<S, N>;
  constexpr int V = Operands::V, kBlocks = Operands::kBlocks;
  const int n = static_cast<int>(selection.rows.n), lane = threadIdx.x % kWarp;
  const double* mine = weights + lane / kDepth * mix.stride + lane % kDepth;
  bool multiplied_bad = false;
#pragma unroll 1
  for (int begin = 0; begin < kWarp; begin += V * kSide) {
    double sums[V][kBlocks][2] = {};
    Operands operands(selection, tile, begin + lane / kDepth * V);
#pragma unroll 1
    for (int first = 0; first < n; first += kMixSteps * kDepth) {
      operands.read(first);
      multiplied_bad |= operands.clean(first, selection.flags, mix.used);
      __syncwarp();
      operands.multiply(mine + first, mix.stride, sums);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int which = b * kSide + lane / kDepth;
      if (which >= mix.k) continue;
      const double reciprocal = mix.averages[which].reciprocal;
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int p = 0; p < 2; ++p)
          mixed[which * kStride + begin + (2 * (lane % kDepth) + p) * V + v] =
              static_cast<float>(sums[v][b][p] * reciprocal);
    }
  }
  return multiplied_bad;
}
#endif

// `selection.rows` are the rows in tiles of 32 columns; its n, and its pads, those of the mixtures.
template <class S, int N, bool kMedian>
__global__ void __launch_bounds__(kMixThreads, 1) select_mixed_rows(const Selection selection, const Mixtures mix) {
#if RK_TENSOR_CODE
  constexpr int kStride = kWarp + 1;
  RK_DYNAMIC_SHARED(double, weights);
  const Table& rows = selection.rows;
  const int n = static_cast<int>(rows.n), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* mixed = reinterpret_cast<float*>(weights + N * mix.stride) + warp * N * kStride;
  for (int i = threadIdx.x; i < N * mix.stride; i += kMixThreads) weights[i] = mix.weights[i];
  __syncthreads();

  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kMixWarps + warp; t < rows.n_tiles;
       t += static_cast<int64_t>(gridDim.x) * kMixWarps) {
    const Tile tile = tile_at(rows, t, kWarp);
    __syncwarp();
    const bool multiplied_bad = mix_tile<S, N, kStride>(selection, mix, weights, tile, mixed);
    const bool scalar = __any_sync(0xffffffffu, multiplied_bad) != 0;
    __syncwarp();
    if (lane >= tile.count) continue;
    const int64_t column = tile.first + lane;
    if (scalar)  // what is not finite goes into those mixtures alone that take it
      for (int r = 0; r < mix.k; ++r) {
        double sum = 0;
        for (int i = 0; i < n; ++i)
          if (const double weight = weights[r * mix.stride + i]; weight != 0)
            sum = fma(weight, static_cast<double>(widened(rows.row<S>(tile.segment, i)[column])), sum);
        mixed[r * kStride + lane] = static_cast<float>(sum * mix.averages[r].reciprocal);
      }
    float x[N], check = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < mix.k) {
        x[i] = mixed[i * kStride + lane];
        check = checked(x[i], check);
      } else {
        x[i] = i < mix.k + selection.low_pads ? -infinity<float>() : infinity<float>();
      }
    }
    const int nan_cells = check != 0 ? replace_nan(x) : 0;
    const float value =
        selected<float, N, kMedian>(x, mix.k, nan_cells, selection, Sorted<float, kStride>{mixed + lane});
    static_cast<S*>(selection.out[tile.segment])[column] = narrowed<S>(value);
  }
#endif
}

}  // namespace cuda
}  // namespace rk
