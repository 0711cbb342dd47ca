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
// V columns of a tile, of every fourth row from a thread's first on.
template <class S, int V>
__device__ __forceinline__ void read_steps(const Table& rows, const Tile& tile, int at, bool whole, int first,
                                           float (&x)[kMixSteps][V]) {
  const int n = static_cast<int>(rows.n), lane = threadIdx.x % kWarp;
  if (whole) {
#pragma unroll
    for (int step = 0; step < kMixSteps; ++step) {
      const int i = first + step * kDepth + lane % kDepth;
      Pack<S, V> pack{};
      if (i < n) pack = *reinterpret_cast<const Pack<S, V>*>(rows.row<S>(tile.segment, i) + tile.first + at);
#pragma unroll
      for (int v = 0; v < V; ++v) x[step][v] = widened(pack.cell[v]);
    }
  } else {
#pragma unroll
    for (int step = 0; step < kMixSteps; ++step) {
      const int i = first + step * kDepth + lane % kDepth;
#pragma unroll
      for (int v = 0; v < V; ++v)
        x[step][v] = i < n && at + v < tile.count ? widened(rows.row<S>(tile.segment, i)[tile.first + at + v]) : 0.0f;
    }
  }
}
// Adds these rows' products with this thread's weights of them.
template <int V, int kBlocks>
__device__ __forceinline__ void add_steps(const double* weights, int stride, const float (&x)[kMixSteps][V],
                                          double (&sums)[V][kBlocks][2]) {
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
template <int kStride, int V, int kBlocks>
__device__ __forceinline__ void store_mixed(const Mixtures& mix, const double (&sums)[V][kBlocks][2], float* mixed) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int which = b * kSide + lane / kDepth;
    if (which >= mix.k) continue;
    const double reciprocal = mix.averages[which].reciprocal;
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int p = 0; p < 2; ++p)
        mixed[which * kStride + (2 * (lane % kDepth) + p) * V + v] = static_cast<float>(sums[v][b][p] * reciprocal);
  }
}
// A column whose values are not all finite: those that are not go into those mixtures alone that take them.
template <class S, int kStride>
__device__ __forceinline__ void mix_alone(const Table& rows, const Mixtures& mix, const double* weights,
                                          int64_t segment, int64_t column, float* mixed) {
  for (int r = 0; r < mix.k; ++r) {
    double sum = 0;
    for (int i = 0; i < static_cast<int>(rows.n); ++i)
      if (const double weight = weights[r * mix.stride + i]; weight != 0)
        sum = fma(weight, static_cast<double>(widened(rows.row<S>(segment, i)[column])), sum);
    mixed[r * kStride] = static_cast<float>(sum * mix.averages[r].reciprocal);
  }
}
template <int N, bool kMedian, int kStride>
__device__ __forceinline__ float selected_mixture(const Selection& selection, int k, float* mixed) {
  float x[N], check = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < k) {
      x[i] = mixed[i * kStride];
      check = checked(x[i], check);
    } else {
      x[i] = i < k + selection.low_pads ? -infinity<float>() : infinity<float>();
    }
  }
  const int nan_cells = check != 0 ? replace_nan(x) : 0;
  return selected<float, N, kMedian>(x, k, nan_cells, selection, Sorted<float, kStride>{mixed});
}
#endif

// `selection.rows` are the rows in tiles of 32 columns; its n, and its pads, those of the mixtures.
template <class S, int N, bool kMedian>
__global__ void __launch_bounds__(kMixThreads, 1) select_mixed_rows(const Selection selection, const Mixtures mix) {
#if RK_TENSOR_CODE
  constexpr int V = kMixColumns<N>, kBlocks = N / kSide, kStride = kWarp + 1;
  RK_DYNAMIC_SHARED(double, weights);
  const Table& rows = selection.rows;
  const int n = static_cast<int>(rows.n), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* mixed = reinterpret_cast<float*>(weights + N * mix.stride) + warp * N * kStride;
  for (int i = threadIdx.x; i < N * mix.stride; i += kMixThreads) weights[i] = mix.weights[i];
  __syncthreads();
  const double* mine = weights + lane / kDepth * mix.stride + lane % kDepth;

  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kMixWarps + warp; t < rows.n_tiles;
       t += static_cast<int64_t>(gridDim.x) * kMixWarps) {
    const Tile tile = tile_at(rows, t, kWarp);
    bool multiplied_bad = false;
    __syncwarp();
#pragma unroll 1
    for (int begin = 0; begin < kWarp; begin += V * kSide) {
      double sums[V][kBlocks][2] = {};
      const int at = begin + lane / kDepth * V;
      const bool whole = selection.vectorised && at + V <= tile.count;
      float x[kMixSteps][V];
#pragma unroll 1
      for (int first = 0; first < n; first += kMixSteps * kDepth) {
        read_steps<S>(rows, tile, at, whole, first, x);
        float check = 0;
#pragma unroll
        for (int step = 0; step < kMixSteps; ++step)
#pragma unroll
          for (int v = 0; v < V; ++v) check = checked(x[step][v], check);
        if (check != 0)
#pragma unroll
          for (int step = 0; step < kMixSteps; ++step)
#pragma unroll
            for (int v = 0; v < V; ++v)
              if (!is_finite(x[step][v])) {
                const int i = first + step * kDepth + lane % kDepth;
                set_flag(selection.flags, i);
                multiplied_bad |= mix.used[i] != 0;
                x[step][v] = 0.0f;
              }
        __syncwarp();
        add_steps(mine + first, mix.stride, x, sums);
      }
      store_mixed<kStride>(mix, sums, mixed + begin);
    }
    const bool scalar = __any_sync(0xffffffffu, multiplied_bad) != 0;
    __syncwarp();
    if (lane >= tile.count) continue;
    const int64_t column = tile.first + lane;
    if (scalar) mix_alone<S, kStride>(selection.rows, mix, weights, tile.segment, column, mixed + lane);
    static_cast<S*>(selection.out[tile.segment])[column] =
        narrowed<S>(selected_mixture<N, kMedian, kStride>(selection, mix.k, mixed + lane));
  }
#endif
}

}  // namespace cuda
}  // namespace rk
