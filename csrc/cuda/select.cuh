// Device code of select_columns for up to 64 rows: every thread sorts the values of whole columns.
#pragma once
#include "network.cuh"

namespace rk {
namespace cuda {

// What one selection needs; pointers are the device's.
struct Selection {
  Table rows;
  void* const* out;               // (n_segments), or one that begins where the run does, or null
  const int64_t* multiplicities;  // (n), or null
  int64_t lo, hi, nearest;
  double share;  // of a cell in the mean
  double scale;
  double* partials;  // (blocks, n) squared distances, or null
  unsigned* flags;   // (n) rows that hold a NaN or Inf
  int low_pads;      // wires filled with -inf: a median's network has even size, and its ranks are the middle ones
  bool vectorised;   // rows and results are aligned to 16 bytes
};

template <class C>
__device__ __forceinline__ C middle_of(C a, C b) {
  const C middle = (a + b) * static_cast<C>(0.5);
  return is_finite(middle) ? middle : a * static_cast<C>(0.5) + b * static_cast<C>(0.5);  // halves may vanish
}

// A column's sorted values in shared memory, kStride apart.
template <class C, int kStride>
struct Sorted {
  C* cell;
  __device__ __forceinline__ C& operator[](int64_t rank) const { return cell[rank * kStride]; }
};

// Mean of sorted[lo..hi): summed as differences from the smallest, so that a common offset costs no digits and equal
// values come back. It never leaves the range of its values.
template <class C, int kStride>
__device__ double window_mean(const Sorted<C, kStride>& sorted, int64_t lo, int64_t hi) {
  const C first = sorted[lo], last = sorted[hi - 1];
  if (first == last) return static_cast<double>(first);
  if (hi - lo == 2) return static_cast<double>(middle_of(first, last));
  const double low = static_cast<double>(first), high = static_cast<double>(last);
  const double count = static_cast<double>(hi - lo);
  double sum = 0;
  for (int64_t r = lo + 1; r < hi; ++r) sum += static_cast<double>(sorted[r]) - low;
  double mean = moved(low, sum, count);
  if (!is_finite(mean)) {  // differences overflow, or meet an infinity
    DoubledSum shrunken{0, 0};
    for (int64_t r = lo; r < hi; ++r) shrunken.add(static_cast<double>(sorted[r]) * kRoom, 0);
    mean = grown(shrunken, count, false);
  }
  return mean < low ? low : mean > high ? high : mean;
}

// Whether low + high < a + b, exactly: where both are rounded to the same number, by what that loses. Halves do not
// overflow.
template <class C>
__device__ __forceinline__ bool is_less(C low, C high, C a, C b) {
  C sum = low + high, other = a + b, lost, other_lost;
  if (sum != other) return sum < other;
  const C half = is_finite(other) ? C{1} : static_cast<C>(0.5);
  two_sum(low * half, high * half, sum, lost);
  two_sum(a * half, b * half, other, other_lost);
  return sum < other || (sum == other && lost < other_lost);
}

// The rank from which on the `nearest` values nearest to the middle of the ends of [lo, hi) lie: they are consecutive,
// and one is not among them where that many ranks above lies a value nearer to the middle.
template <class C, int kStride>
__device__ int64_t nearest_rank(const Sorted<C, kStride>& sorted, int64_t n, int64_t lo, int64_t hi, int64_t nearest) {
  const C a = sorted[lo], b = sorted[hi - 1];
  int64_t begin = 0;
  for (int64_t k = 0; k + nearest < n; ++k) begin += is_less<C>(sorted[k], sorted[k + nearest], a, b);
  return begin;
}

// One thread sorts V columns: as many as 16 bytes of a row hold and the registers allow.
constexpr int power_below(int count) {
  int power = 1;
  while (2 * power <= count) power *= 2;
  return power;
}
template <class S, int N, bool kMedian>
struct NetworkShape {
  static constexpr int kLeastRows = kMedian ? least_rows(N, MedianSizes{}) : least_rows(N, SortSizes{});
  static constexpr int kWide = 16 / sizeof(S),
                       kFit = (N <= 32 || sizeof(S) == 2 ? 512 : 256) / (N * sizeof(ComputeOf<S>));
  static constexpr int kColumns = !kMedian || kFit < 1 ? 1 : power_below(kWide < kFit ? kWide : kFit);
  // A full sort is left in shared memory: 32 KiB at most.
  static constexpr int kThreads = !kMedian && N * sizeof(ComputeOf<S>) > 256 ? 64 : 128;
  static constexpr int kWidth = kThreads * kColumns;
  // Blocks that share a multiprocessor at least: so the values and what loads them need fewer than 256 registers.
  static constexpr int kValues = N * kColumns * static_cast<int>(sizeof(ComputeOf<S>) / 4);
  static constexpr bool kDoubles = sizeof(ComputeOf<S>) == 8;
  static constexpr int kBlocks = (kValues <= 64         ? (N == 64 || (kDoubles && N == 32 && !kMedian) ? 3 : 4)
                                  : kDoubles || N == 64 ? 2
                                                        : 3) *
                                 128 / kThreads;
};

template <class S, int N, bool kMedian>
__global__ void __launch_bounds__(NetworkShape<S, N, kMedian>::kThreads, NetworkShape<S, N, kMedian>::kBlocks)
    select_by_network(const Selection args) {
  using C = ComputeOf<S>;
  using Shape = NetworkShape<S, N, kMedian>;
  constexpr int V = Shape::kColumns;
  RK_SHARED(C, centre, [Shape::kWidth]);
  RK_SHARED(C, cells, [(kMedian ? 1 : N) * Shape::kThreads]);
  const Table& rows = args.rows;
  const int n = static_cast<int>(rows.n), at = threadIdx.x * V;
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, Shape::kWidth);
    const int64_t column = tile.first + at;
    const int valid = tile.count - at < V ? tile.count - at : V;
    if (valid > 0) {
      C x[V][N], check[V];
#pragma unroll
      for (int v = 0; v < V; ++v) check[v] = 0;
      const bool whole = args.vectorised && valid == V;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < Shape::kLeastRows || i < n) {
          const S* source = rows.row<S>(tile.segment, i) + column;
          if (whole) {
            const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(source);
#pragma unroll
            for (int v = 0; v < V; ++v) x[v][i] = widened(pack.cell[v]);
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v) x[v][i] = v < valid ? widened(source[v]) : C{0};
          }
#pragma unroll
          for (int v = 0; v < V; ++v) check[v] = checked(x[v][i], check[v]);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) x[v][i] = i < n + args.low_pads ? -infinity<C>() : infinity<C>();
        }
      }
      Pack<S, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int nan_cells = 0;
        if (check[v] != 0) {
          for (int i = 0; i < n; ++i)
            if (!is_finite(widened(rows.row<S>(tile.segment, i)[column + v]))) set_flag(args.flags, i);
          nan_cells = replace_nan(x[v]);
        }
        sort_wires<Network<N, kMedian>>(x[v]);
        // A window that reaches a NaN gives NaN, and so do nearest values of which one is a NaN.
        const bool spoilt = nan_cells > n - (args.hi > args.nearest ? args.hi : args.nearest);
        if constexpr (kMedian) {
          const C low = x[v][N / 2 - 1], high = x[v][N / 2];
          const C value = args.hi - args.lo == 2 ? middle_of(low, high) : args.lo == (n - 1) / 2 ? low : high;
          result.cell[v] = narrowed<S>(spoilt ? not_a_number<C>() : value);
        } else {
          const Sorted<C, Shape::kThreads> sorted{cells + threadIdx.x};
#pragma unroll
          for (int i = 0; i < N; ++i) sorted[i] = x[v][i];
          const double ends = static_cast<double>(sorted[args.lo] + sorted[args.hi - 1]);
          const bool usual = is_finite(sorted[args.lo]) && is_finite(sorted[args.hi - 1]);
          const int64_t lo = args.nearest ? nearest_rank(sorted, n, args.lo, args.hi, args.nearest) : args.lo;
          const double mean = window_mean(sorted, lo, args.nearest ? lo + args.nearest : args.hi);
          const double value = usual || !args.nearest ? mean : ends;  // an infinite middle is itself the result
          result.cell[v] = rounded<S>(spoilt ? not_a_number<double>() : value);
        }
        if (args.partials) centre[at + v] = widened(result.cell[v]);
      }
      if (args.out) {
        S* target = static_cast<S*>(args.out[tile.segment]) + (column - rows.first);
        if (whole) {
          store(target, result);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (v < valid) target[v] = result.cell[v];
        }
      }
    }
    if (args.partials) {
      __syncthreads();
      add_sq_distances<S>(rows, tile, centre, args.scale, args.partials + blockIdx.x * rows.n);
      __syncthreads();
    }
  }
}

}  // namespace cuda
}  // namespace rk
