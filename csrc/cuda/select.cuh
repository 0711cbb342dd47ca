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

// Threads of a warp that share a column: each takes every kLanes-th of what is to be done, and all get the sums. The
// warp's other threads do the same for theirs at the same time.
template <int kLanes>
struct Lanes {
  int lane;
  template <class T>
  __device__ __forceinline__ T sum(T x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  template <class F>
  __device__ __forceinline__ void each(int64_t begin, int64_t end, F&& call) const {
    for (int64_t i = begin + lane; i < end; i += kLanes) call(i);
  }
};

// Mean of sorted[lo..hi), and what its rounding lost: summed as differences from the smallest, so that a common offset
// costs no digits and equal values come back. It never leaves the range of its values.
template <class C, class Values, int kLanes>
__device__ double window_mean(const Values& sorted, const Lanes<kLanes>& lanes, int64_t lo, int64_t hi, double& lost) {
  const C first = sorted[lo], last = sorted[hi - 1];
  const double low = static_cast<double>(first), high = static_cast<double>(last);
  const double count = static_cast<double>(hi - lo);
  double sum = 0;
  lanes.each(lo + 1, hi, [&](int64_t r) { sum += static_cast<double>(sorted[r]) - low; });
  sum = lanes.sum(sum);
  lost = 0;
  if (first == last) return low;
  if (hi - lo == 2) return static_cast<double>(middle_of(first, last));
  double mean = moved(low, sum, count, lost);
  if (!is_finite(mean)) {  // differences overflow, or meet an infinity
    DoubledSum shrunken{0, 0};
    for (int64_t r = lo; r < hi; ++r) shrunken.add(static_cast<double>(sorted[r]) * kRoom, 0);
    mean = grown(shrunken, count, false);
    lost = 0;
  }
  return mean < low ? low : mean > high ? high : mean;
}

// Twice a middle, times a scale: a power of two, so that it does not overflow. `lost` is what its rounding lost.
template <class C>
struct Twice {
  C total, scale;
  double lost;

  // Of the middle of a and b, and a rest that is added to it.
  __device__ __forceinline__ Twice(C a, C b, double rest) : scale(is_finite(a + b) ? C{1} : static_cast<C>(0.5)) {
    C rough, of_sum;
    two_sum(a * scale, b * scale, rough, of_sum);
    const double more = static_cast<double>(of_sum) + rest * static_cast<double>(scale + scale);
    total = static_cast<C>(static_cast<double>(rough) + more);
    lost = (static_cast<double>(rough) - static_cast<double>(total)) + more;
  }
  // Whether low + high is less, exactly: where both are rounded to the same number, by what that loses.
  __device__ __forceinline__ bool more_than(C low, C high) const {
    C sum = low * scale + high * scale, sum_lost;
    if (sum != total) return sum < total;
    two_sum(low * scale, high * scale, sum, sum_lost);
    return static_cast<double>(sum_lost) < lost;
  }
};

// The rank from which on the `nearest` values nearest to a middle lie: they are consecutive, and one is not among them
// where that many ranks above lies a value nearer to it.
template <class C, class Values, int kLanes>
__device__ int nearest_rank(const Values& sorted, const Lanes<kLanes>& lanes, int64_t n, const Twice<C>& middle,
                            int64_t nearest) {
  int begin = 0;
  lanes.each(0, n - nearest, [&](int64_t k) { begin += middle.more_than(sorted[k], sorted[k + nearest]); });
  return lanes.sum(begin);
}

// What a selection gives: a NaN where its window reaches one, or where one is among the nearest values.
__device__ __forceinline__ bool is_spoilt(int nan_cells, int n, const Selection& args) {
  return nan_cells > n - (args.hi > args.nearest ? args.hi : args.nearest);
}
template <class O, class C>
__device__ __forceinline__ O median_of(C low, C high, int n, int nan_cells, const Selection& args) {
  const C value = args.hi - args.lo == 2 ? middle_of(low, high) : args.lo == (n - 1) / 2 ? low : high;
  return narrowed<O>(is_spoilt(nan_cells, n, args) ? not_a_number<C>() : value);
}
template <class O, class C, class Values, int kLanes>
__device__ __forceinline__ O window_of(const Values& sorted, const Lanes<kLanes>& lanes, int n, int nan_cells,
                                       const Selection& args) {
  const int64_t lo = args.lo, hi = args.hi;
  C a = sorted[lo], b = sorted[hi - 1];
  double value = static_cast<double>(a + b), rest = 0;
  if (!args.nearest || hi - lo > 2) {
    double lost;
    value = window_mean<C>(sorted, lanes, lo, hi, lost);
    a = b = static_cast<C>(value);
    rest = (value - static_cast<double>(a)) + lost;
  }
  if (args.nearest) {  // an infinite middle is itself the result
    const bool usual = is_finite(a) && is_finite(b);
    const Twice<C> middle(usual ? a : C{0}, usual ? b : C{0}, usual ? rest : 0.0);
    const int64_t begin = nearest_rank<C>(sorted, lanes, n, middle, args.nearest);
    double lost;
    const double near = window_mean<C>(sorted, lanes, begin, begin + args.nearest, lost);
    value = usual ? near : value;
  }
  return rounded<O>(is_spoilt(nan_cells, n, args) ? not_a_number<double>() : value);
}
// The same for the values of a column, of which the NaN are now infinities and counted; a full sort leaves them in
// `sorted`.
template <class O, int N, bool kMedian, class C, int kStride>
__device__ __forceinline__ O selected(C (&x)[N], int n, int nan_cells, const Selection& args,
                                      const Sorted<C, kStride>& sorted) {
  sort_wires<Network<N, kMedian>>(x);
  if constexpr (kMedian) {
    return median_of<O>(x[N / 2 - 1], x[N / 2], n, nan_cells, args);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) sorted[i] = x[i];
    return window_of<O, C>(sorted, Lanes<1>{0}, n, nan_cells, args);
  }
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
  static constexpr int kWide = 16 / sizeof(S), kFit = (kMedian ? 256 : 128) / (N * sizeof(ComputeOf<S>));
  static constexpr int kColumns = kFit < 1 ? 1 : power_below(kWide < kFit ? kWide : kFit);
  // A full sort is left in shared memory: 32 KiB at most.
  static constexpr int kThreads = !kMedian && N * sizeof(ComputeOf<S>) > 256 ? 64 : 128;
  static constexpr int kWidth = kThreads * kColumns;
  // Blocks that share a multiprocessor at least: so the values and what loads them need fewer than 256 registers.
  static constexpr int kValues = N * kColumns * static_cast<int>(sizeof(ComputeOf<S>) / 4);
  static constexpr bool kDoubles = sizeof(ComputeOf<S>) == 8;
  // Where a block keeps distances until it ends: in shared memory, but for the one shape that has no register for it.
  static constexpr bool kKeeps = !(kDoubles && N == 64 && !kMedian);
  static constexpr int kBlocks = (kValues <= 64         ? (N == 64 || (kDoubles && N == 32 && !kMedian) ? 3 : 4)
                                  : kDoubles || N == 64 ? 2
                                                        : 3) *
                                 128 / kThreads;
};

// In one piece: with its loads, stores or checks in functions of their own some of its shapes took up to 28 registers
// more, or spilled (CUDA 13.0).
template <class S, int N, bool kMedian>
__global__ void __launch_bounds__(NetworkShape<S, N, kMedian>::kThreads, NetworkShape<S, N, kMedian>::kBlocks)
    select_by_network(const Selection args) {
  using C = ComputeOf<S>;
  using Shape = NetworkShape<S, N, kMedian>;
  constexpr int V = Shape::kColumns;
  RK_SHARED(double, centre, [Shape::kWidth]);
  RK_SHARED(double, distances, [N]);
  RK_SHARED(C, cells, [(kMedian ? 1 : N) * Shape::kThreads]);
  const Table& rows = args.rows;
  const int n = static_cast<int>(rows.n), at = threadIdx.x * V;
  if (Shape::kKeeps)
    for (int i = threadIdx.x; i < n; i += Shape::kThreads) distances[i] = 0;
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, Shape::kWidth);
    const int64_t column = tile.first + at;
    const int valid = tile.count - at < V ? tile.count - at : V;
    if (valid > 0) {
      C x[V][N], check[V];
      const bool whole = args.vectorised && valid == V;
      // All loads before anything that waits for one of them, and no branch between them.
      if (whole || V == 1) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (i < Shape::kLeastRows || i < n) {
            const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(rows.row<S>(tile.segment, i) + column);
#pragma unroll
            for (int v = 0; v < V; ++v) x[v][i] = widened(pack.cell[v]);
          }
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (i < Shape::kLeastRows || i < n) {
            const S* source = rows.row<S>(tile.segment, i) + column;
#pragma unroll
            for (int v = 0; v < V; ++v) x[v][i] = v < valid ? widened(source[v]) : C{0};
          }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        check[v] = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i < Shape::kLeastRows || i < n)
            check[v] = checked(x[v][i], check[v]);
          else
            x[v][i] = i < n + args.low_pads ? -infinity<C>() : infinity<C>();
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
        result.cell[v] =
            selected<S, N, kMedian>(x[v], n, nan_cells, args, Sorted<C, Shape::kThreads>{cells + threadIdx.x});
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
      add_sq_distances<S>(rows, tile, centre, args.scale,
                          Shape::kKeeps ? distances : args.partials + blockIdx.x * rows.n);
      __syncthreads();
    }
  }
  if (Shape::kKeeps && args.partials)
    for (int i = threadIdx.x; i < n; i += blockDim.x) args.partials[blockIdx.x * rows.n + i] = distances[i];
}

}  // namespace cuda
}  // namespace rk
