// Device code of the sums over rows and columns: weighted sums of rows, squared distances, what blocks leave behind.
#pragma once
#include "device.cuh"

namespace rk {
namespace cuda {

constexpr int kSumThreads = 128;

// ---- weighted sums of rows -------------------------------------------------------------------------------

// Weights of so many sums at a time, which share what is read: for each group of sums the rows of which any takes some,
// in order, and their weights side by side.
struct Weights {
  const int64_t* first;    // (groups + 1) sums
  const int64_t* base;     // (groups) a row that all of the group's sums take, or -1
  const int64_t* start;    // (groups + 1)
  const int64_t* row;      // (start[groups])
  const double* factor;    // (start[groups], sums of a group)
  const Average* average;  // (k)
  int64_t groups, k;
};

// Sums of a group, and columns of a thread: 16 bytes of a row, but for several sums fewer registers.
constexpr int kGroupedSums = 4;
template <class S, int kSums>
constexpr int kSumColumns = kSums == 1 || sizeof(S) > 4 ? 16 / sizeof(S) : 4;

// A thread's columns of a tile, and a group's sums of them.
template <class S, int kSums>
struct GroupSums {
  static constexpr int V = kSumColumns<S, kSums>, kWidth = V * kSumThreads;
  static constexpr bool kDoubled = sizeof(S) == 8 && kSums == 1, kCentred = sizeof(S) == 8 && kSums > 1;
  const Table& rows;
  const Weights& weights;
  int64_t group, begin, end;  // what the group takes
  int64_t segment, column;
  int valid;
  DoubledSum sum[kSums][V];
  double base[V];

  __device__ __forceinline__ GroupSums(const Table& table, const Weights& all, int64_t of, const Tile& tile, int at,
                                       int there)
      : rows(table),
        weights(all),
        group(of),
        begin(all.start[of]),
        end(all.start[of + 1]),
        segment(tile.segment),
        column(tile.first + at),
        valid(there) {
#pragma unroll
    for (int r = 0; r < kSums; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[r][v] = {0, 0};
        base[v] = 0;
      }
  }
  template <bool kWhole>
  __device__ __forceinline__ void read(int64_t row, double (&x)[V]) const {
    const S* source = rows.row<S>(segment, row) + column;
    if constexpr (kWhole) {
      const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(source);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = static_cast<double>(widened(pack.cell[v]));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = v < valid ? static_cast<double>(widened(source[v])) : 0;
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void add_up() {
    if constexpr (kCentred)
      if (weights.base[group] >= 0) read<kWhole>(weights.base[group], base);
#pragma unroll 4
    for (int64_t u = begin; u < end; ++u) {
      double x[V];
      read<kWhole>(weights.row[u], x);
#pragma unroll
      for (int r = 0; r < kSums; ++r) {
        const double factor = weights.factor[u * kSums + r];
        if (kSums > 1 && factor == 0) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if constexpr (kDoubled)
            sum[r][v].add_product(factor, x[v]);
          else
            sum[r][v].high = fma(factor, kCentred ? x[v] - base[v] : x[v], sum[r][v].high);
        }
      }
    }
  }
  // Sum r of column v over its divisor.
  __device__ __forceinline__ double quotient(int r, int v, const Average& average) const {
    double total;
    if constexpr (kDoubled)
      total = divided(sum[r][v], average.divisor);
    else if constexpr (kCentred)
      total = moved(base[v] * average.whole, sum[r][v].high, average.divisor);
    else
      total = sum[r][v].high / average.divisor;
    if constexpr (sizeof(S) == 8)
      if (!is_finite(total) && v < valid) {
        DoubledSum shrunken{0, 0};
        for (int64_t u = begin; u < end; ++u) {
          const double factor = weights.factor[u * kSums + r];
          if (factor != 0)
            shrunken.add_product(factor, widened(rows.row<S>(segment, weights.row[u])[column + v]) * kRoom);
        }
        total = grown(shrunken, average.divisor, average.averaging);
      }
    return total;
  }
};

// out[s * k + r] = sum r of segment s, or of a run of its columns, over its divisor. Single sums of float64 rows carry
// their rounding errors; grouped ones are of differences from a row that they share, which costs less.
template <class S, class O, int kSums>
__global__ void __launch_bounds__(kSumThreads, 1)
    weighted_sums(const Table rows, const Weights weights, void* const* out, bool vectorised) {
  using Sums = GroupSums<S, kSums>;
  constexpr int V = Sums::V;
  const int64_t group = blockIdx.y;
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, Sums::kWidth);
    const int at = threadIdx.x * V, valid = tile.count - at < V ? tile.count - at : V;
    if (valid <= 0) continue;
    const bool whole = vectorised && valid == V;
    Sums sums(rows, weights, group, tile, at, valid);
    if (whole)  // decided once, so that loads of several rows are under way together
      sums.template add_up<true>();
    else
      sums.template add_up<false>();
#pragma unroll
    for (int r = 0; r < kSums; ++r) {
      const int64_t which = weights.first[group] + r;
      if (which >= weights.first[group + 1]) break;
      const Average average = weights.average[which];
      Pack<O, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.cell[v] = rounded<O>(sums.quotient(r, v, average));
      store(static_cast<O*>(out[tile.segment * weights.k + which]) + (sums.column - rows.first), result, whole, valid);
    }
  }
}

// ---- rows that hold a NaN or Inf -------------------------------------------------------------------------

constexpr int kRunColumns = 512;

template <class S>
__global__ void __launch_bounds__(kSumThreads, 1) find_nonfinite(const Table rows, unsigned* flags) {
  const int lane = threadIdx.x % kWarp, warps = kSumThreads / kWarp;
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, kRunColumns);
    for (int64_t i = blockIdx.y * warps + threadIdx.x / kWarp; i < rows.n; i += gridDim.y * warps) {
      const S* x = rows.row<S>(tile.segment, i) + tile.first;
      bool found = false;
      for (int c = lane; c < tile.count; c += kWarp) found |= !is_finite(widened(x[c]));
      if (found) set_flag(flags, i);
    }
  }
}

// ---- squared distances -----------------------------------------------------------------------------------

// partials[block, i] += squared distance of row i to a centre, in a run of columns; `centre` begins where the run does.
template <class A, class S>
__global__ void __launch_bounds__(kSumThreads, 1)
    sq_distances(const Table rows, const S* centre, double scale, double* partials) {
  RK_SHARED(double, cells, [kRunColumns]);
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, kRunColumns);
    for (int c = threadIdx.x; c < tile.count; c += kSumThreads) cells[c] = widened(centre[tile.first - rows.first + c]);
    __syncthreads();
    add_sq_distances<A>(rows, tile, cells, scale, partials + blockIdx.x * rows.n);
    __syncthreads();
  }
}

constexpr int kDoubledColumns = 8 * kSumThreads;  // of a tile

// partials[block, i] = squared distance of row i = blockIdx.y to a centre, or where that is null to the origin, in the
// block's columns.
template <class S>
__global__ void __launch_bounds__(kSumThreads, 1)
    row_sq_distances_of(const Table rows, const void* const* centre, double scale, DoubledSum* partials) {
  RK_SHARED(DoubledSum, sums, [kSumThreads]);
  const int64_t i = blockIdx.y;
  DoubledSum total{0, 0};
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, kDoubledColumns);
    const S* x = rows.row<S>(tile.segment, i) + tile.first;
    const S* y = centre ? static_cast<const S*>(centre[tile.segment]) + tile.first : nullptr;
    for (int c = threadIdx.x; c < tile.count; c += kSumThreads)
      total.add_square(static_cast<double>(widened(x[c])) * scale, y ? static_cast<double>(widened(y[c])) * scale : 0);
  }
  sums[threadIdx.x] = total;
  for (int step = kSumThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) {
      const DoubledSum other = sums[threadIdx.x + step];
      sums[threadIdx.x].add(other.high, other.low);
    }
  }
  if (threadIdx.x == 0) partials[blockIdx.x * rows.n + i] = sums[0];
}

// ---- what blocks leave behind ----------------------------------------------------------------------------

constexpr int kAddSlices = 16, kAddThreads = kWarp * kAddSlices;

// out[i] = sum of partials[b, i] over the blocks: every slice takes each sixteenth of them, in their order.
template <class T>  // only so that the definition may be repeated
__global__ void __launch_bounds__(kAddThreads, 1) add_blocks(const T* partials, int64_t blocks, int64_t count, T* out) {
  RK_SHARED(T, sums, [kAddThreads]);
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  T sum = 0;
  if (i < count)
#pragma unroll 4
    for (int64_t b = slice; b < blocks; b += kAddSlices) sum += partials[b * count + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || i >= count) return;
  for (int s = 1; s < kAddSlices; ++s) sum += sums[s * kWarp + lane];
  out[i] = sum;
}
template <class T>
__global__ void __launch_bounds__(kAddThreads, 1)
    add_doubled_blocks(const DoubledSum* partials, int64_t blocks, int64_t count, T* out) {
  RK_SHARED(DoubledSum, sums, [kAddThreads]);
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  DoubledSum sum{0, 0};
  if (i < count)
    for (int64_t b = slice; b < blocks; b += kAddSlices)
      sum.add(partials[b * count + i].high, partials[b * count + i].low);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || i >= count) return;
  double plain = sum.high;
  for (int s = 1; s < kAddSlices; ++s) {
    sum.add(sums[s * kWarp + lane].high, sums[s * kWarp + lane].low);
    plain += sums[s * kWarp + lane].high;
  }
  out[i] = is_finite(plain) ? sum.high + sum.low : plain;  // an overflow stays an infinity
}

// A result of the compute type as it is stored.
template <class S>
__global__ void __launch_bounds__(kSumThreads, 1) store_result(const ComputeOf<S>* result, int64_t columns, S* stored) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; c < columns; c += step)
    stored[c] = narrowed<S>(result[c]);
}

}  // namespace cuda
}  // namespace rk
