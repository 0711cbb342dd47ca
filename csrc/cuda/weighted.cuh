// Device code of select_columns for a few rows that stand for several cells each: every thread sorts the values of a
// column, and takes along of which rows they are.
#pragma once
#include "select.cuh"

namespace rk {
namespace cuda {

constexpr int kWeightedRows = 32;  // as many as registers hold

template <class C>
struct OfRow {
  C value;
  int row;
};
template <class C>
__device__ __forceinline__ void exchange(OfRow<C>& low, OfRow<C>& high) {
  const bool swap = high.value < low.value;
  const OfRow<C> smaller{swap ? high.value : low.value, swap ? high.row : low.row};
  high = {swap ? low.value : high.value, swap ? low.row : high.row};
  low = smaller;
}

// A column's values, sorted; the cells of each are those of its row.
template <class C, int N>
struct SortedCells {
  const OfRow<C> (&x)[N];
  const volatile int64_t* weights;  // read again in every pass: registers are few

  // call(value, its first cell, the first after it) for each.
  template <class F>
  __device__ __forceinline__ void each(F&& call) const {
    int64_t begin = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t end = begin + weights[x[i].row];
      call(x[i].value, begin, end);
      begin = end;
    }
  }
  // call(value, how many of its cells lie in the window) for those that have some.
  template <class F>
  __device__ __forceinline__ void within(int64_t lo, int64_t hi, F&& call) const {
    each([&](C value, int64_t begin, int64_t end) {
      const int64_t count = (end < hi ? end : hi) - (begin > lo ? begin : lo);
      if (count > 0) call(static_cast<double>(value), static_cast<double>(count));
    });
  }
  // Mean of the cells [lo, hi), as of sorted values (window_mean).
  __device__ __forceinline__ double mean(int64_t lo, int64_t hi) const {
    C first = 0, last = 0;
    each([&](C value, int64_t begin, int64_t) {  // the last ones that begin there: values without cells never are
      first = begin <= lo ? value : first;
      last = begin < hi ? value : last;
    });
    const double low = static_cast<double>(first), high = static_cast<double>(last);
    if (first == last) return low;
    if (hi - lo == 2) return static_cast<double>(middle_of(first, last));
    const double cells = static_cast<double>(hi - lo);
    double sum = 0, lost;
    within(lo, hi, [&](double value, double count) { sum += count * (value - low); });
    double result = moved(low, sum, cells, lost);
    if (!is_finite(result)) {  // differences overflow, or meet an infinity
      DoubledSum shrunken{0, 0};
      within(lo, hi, [&](double value, double count) { shrunken.add_product(value * kRoom, count); });
      result = grown(shrunken, cells, false);
    }
    return result < low ? low : result > high ? high : result;
  }
};

template <class S, int N>
struct WeightedShape {
  static constexpr int kThreads = 128, kFit = 128 / (N * static_cast<int>(sizeof(ComputeOf<S>)));
  static constexpr int kColumns = kFit < 1 ? 1 : power_below(kFit), kWidth = kThreads * kColumns;
  static constexpr int kBlocks = N < 32 ? 2 : 3;  // that share a multiprocessor at least: so 10.0's registers suffice
};

// V columns of N rows, of which the last one stands for those that are not there: all loads before anything that waits
// for one of them, and no branch between them.
template <class S, int V, int N>
__device__ __forceinline__ void read_columns(const Table& rows, int64_t segment, int64_t column, int n, bool whole,
                                             int valid, ComputeOf<S> (&x)[V][N]) {
  if (whole || V == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const S* source = rows.row<S>(segment, i < n ? i : n - 1) + column;
      const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(source);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v][i] = widened(pack.cell[v]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const S* source = rows.row<S>(segment, i < n ? i : n - 1) + column;
#pragma unroll
      for (int v = 0; v < V; ++v) x[v][i] = v < valid ? widened(source[v]) : ComputeOf<S>{0};
    }
  }
}

template <class S, int N>
__global__ void __launch_bounds__(WeightedShape<S, N>::kThreads, WeightedShape<S, N>::kBlocks)
    select_weighted(const Selection args) {
  using C = ComputeOf<S>;
  using Shape = WeightedShape<S, N>;
  constexpr int V = Shape::kColumns;
  RK_SHARED(double, centre, [Shape::kWidth]);
  RK_SHARED(double, distances, [N]);
  RK_SHARED(int64_t, weights, [N + 1]);  // the last, of wires that are no rows, is 0
  const Table& rows = args.rows;
  const int n = static_cast<int>(rows.n), at = threadIdx.x * V;
  for (int i = threadIdx.x; i <= N; i += Shape::kThreads) {
    weights[i] = i < n ? args.multiplicities[i] : 0;
    if (i < N) distances[i] = 0;
  }
  __syncthreads();
  int64_t cells = 0;
  for (int i = 0; i < n; ++i) cells += weights[i];
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, Shape::kWidth);
    const int left = tile.count - at;
    const bool whole = args.vectorised && left >= V;
    const int64_t column = tile.first + (left > 0 ? at : 0);
    C x[V][N];
    read_columns<S>(rows, tile.segment, column, n, whole, left, x);
    Pack<S, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      OfRow<C> wires[N];
      C check = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        check = checked(x[v][i], check);
        wires[i] = {i < n ? x[v][i] : infinity<C>(), i < n ? i : N};
      }
      int64_t nan_cells = 0;
      if (check != 0) {
        for (int i = 0; i < n; ++i)
          if (!is_finite(widened(rows.row<S>(tile.segment, i)[column + (v < left ? v : 0)]))) set_flag(args.flags, i);
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (wires[i].value != wires[i].value) {
            nan_cells += weights[wires[i].row];
            wires[i].value = infinity<C>();
          }
      }
      sort_wires<Network<N, false>>(wires);
      const double value = SortedCells<C, N>{wires, weights}.mean(args.lo, args.hi);
      result.cell[v] = rounded<S>(nan_cells > cells - args.hi ? not_a_number<double>() : value);
      centre[at + v] = widened(result.cell[v]);
    }
    if (args.out && left > 0)
      store(static_cast<S*>(args.out[tile.segment]) + (column - rows.first), result, whole, left);
    if (args.partials) {
      __syncthreads();
      add_sq_distances<S>(rows, tile, centre, args.scale, distances);
      __syncthreads();
    }
  }
  if (args.partials)
    for (int i = threadIdx.x; i < n; i += Shape::kThreads) args.partials[blockIdx.x * rows.n + i] = distances[i];
}

}  // namespace cuda
}  // namespace rk
