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

// Mean of sorted[lo..hi), and what its rounding lost: summed as differences from the smallest, so that a common offset
// costs no digits and equal values come back. It never leaves the range of its values.
template <class C, int kStride>
__device__ double window_mean(const Sorted<C, kStride>& sorted, int64_t lo, int64_t hi, double& lost) {
  const C first = sorted[lo], last = sorted[hi - 1];
  lost = 0;
  if (first == last) return static_cast<double>(first);
  if (hi - lo == 2) return static_cast<double>(middle_of(first, last));
  const double low = static_cast<double>(first), high = static_cast<double>(last);
  const double count = static_cast<double>(hi - lo);
  double sum = 0;
  for (int64_t r = lo + 1; r < hi; ++r) sum += static_cast<double>(sorted[r]) - low;
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
template <class C, int kStride>
__device__ int64_t nearest_rank(const Sorted<C, kStride>& sorted, int64_t n, const Twice<C>& middle, int64_t nearest) {
  int64_t begin = 0;
  for (int64_t k = 0; k + nearest < n; ++k) begin += middle.more_than(sorted[k], sorted[k + nearest]);
  return begin;
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
template <class O, class C, int kStride>
__device__ __forceinline__ O window_of(const Sorted<C, kStride>& sorted, int n, int nan_cells, const Selection& args) {
  int64_t lo = args.lo, hi = args.hi;
  double value;
#pragma unroll 1
  for (bool near = args.nearest == 0;; near = true) {
    C a = sorted[lo], b = sorted[hi - 1];
    double rest = 0;
    value = static_cast<double>(a + b);
    if (near || hi - lo > 2) {
      double lost;
      value = window_mean(sorted, lo, hi, lost);
      a = b = static_cast<C>(value);
      rest = (value - static_cast<double>(a)) + lost;
    }
    if (near || !is_finite(a) || !is_finite(b)) break;  // an infinite middle is itself the result
    lo = nearest_rank(sorted, n, Twice<C>(a, b, rest), args.nearest);
    hi = lo + args.nearest;
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
    return window_of<O>(sorted, n, nan_cells, args);
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

// ---- 65 to 128 rows of up to 32 bits: two threads sort 64 values each, and then tell the lower half from the upper
// ---

constexpr int kHalfRows = 64, kHalfColumns = kWarp / 2;  // columns of a warp
constexpr int kHalfThreads = 128, kHalfWidth = kHalfThreads / 2;

template <class S, bool kMedian>
__global__ void __launch_bounds__(kHalfThreads, sizeof(S) == 2 ? 2 : 3) select_by_halves(const Selection args) {
  using C = float;
  RK_SHARED(double, centre, [kHalfWidth]);
  RK_SHARED(double, distances, [2 * kHalfRows]);
  RK_SHARED(C, cells, [(kMedian ? 1 : 2 * kHalfRows) * kHalfWidth]);
  const Table& rows = args.rows;
  const int n = static_cast<int>(rows.n), lane = threadIdx.x % kWarp;
  const int half = lane / kHalfColumns, at = threadIdx.x / kWarp * kHalfColumns + lane % kHalfColumns;
  for (int i = threadIdx.x; i < n; i += kHalfThreads) distances[i] = 0;
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, kHalfWidth);
    const bool valid = at < tile.count;
    const int64_t column = tile.first + (valid ? at : tile.count - 1);
    C x[kHalfRows], check = 0;
#pragma unroll
    for (int i = 0; i < kHalfRows; ++i) {  // without a branch: the last row stands for those that are not there
      const int row = half * kHalfRows + i;
      x[i] = widened(rows.row<S>(tile.segment, row < n ? row : n - 1)[column]);
    }
#pragma unroll
    for (int i = 0; i < kHalfRows; ++i) {
      check = checked(x[i], check);
      const int row = half * kHalfRows + i;
      if (row >= n) x[i] = row < n + args.low_pads ? -infinity<C>() : infinity<C>();
    }
    int nan_cells = 0;
    if (check != 0) {
      for (int row = half * kHalfRows; row < n && row < (half + 1) * kHalfRows; ++row)
        if (!is_finite(widened(rows.row<S>(tile.segment, row)[column]))) set_flag(args.flags, row);
      nan_cells = replace_nan(x);
    }
    __syncwarp();
    nan_cells += __shfl_xor_sync(0xffffffffu, nan_cells, kHalfColumns);
    sort_wires<Network<kHalfRows, false>>(x);
    // Of two ascending halves, one read backwards, the smaller values of all pairs are the lower half of both.
#pragma unroll
    for (int i = 0; i < kHalfRows / 2; ++i) {
      const int k = kHalfRows - 1 - i;
      C low = x[i], high = __shfl_xor_sync(0xffffffffu, x[k], kHalfColumns);
      C also_low = x[k], also_high = __shfl_xor_sync(0xffffffffu, x[i], kHalfColumns);
      exchange(low, high);
      exchange(also_low, also_high);
      x[i] = half ? high : low;
      x[k] = half ? also_high : also_low;
    }
    S result{};
    if constexpr (kMedian) {
      C edge = x[0];  // the lower half's greatest value, and the upper half's least
#pragma unroll
      for (int i = 1; i < kHalfRows; ++i) {
        C low = edge, high = x[i];
        exchange(low, high);
        edge = half ? low : high;
      }
      const C other = __shfl_xor_sync(0xffffffffu, edge, kHalfColumns);
      result = median_of<S>(half ? other : edge, half ? edge : other, n, nan_cells, args);
    } else {
#pragma unroll
      for (int step = kHalfRows / 2; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < kHalfRows; ++i)
          if ((i & step) == 0) exchange(x[i], x[i + step]);
      const Sorted<C, kHalfWidth> sorted{cells + at};
#pragma unroll
      for (int i = 0; i < kHalfRows; ++i) sorted[half * kHalfRows + i] = x[i];
      __syncwarp();
      if (half == 0) result = window_of<S>(sorted, n, nan_cells, args);
      __syncwarp();
    }
    if (half == 0 && valid) {
      if (args.out) static_cast<S*>(args.out[tile.segment])[column - rows.first] = result;
      if (args.partials) centre[at] = widened(result);
    }
    if (args.partials) {
      __syncthreads();
      add_sq_distances<S>(rows, tile, centre, args.scale, distances);
      __syncthreads();
    }
  }
  if (args.partials)
    for (int i = threadIdx.x; i < n; i += blockDim.x) args.partials[blockIdx.x * rows.n + i] = distances[i];
}

}  // namespace cuda
}  // namespace rk
