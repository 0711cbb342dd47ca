// Device code of select_columns for 65 to 1024 rows: the values of a column are sorted in runs of 32, a thread each,
// and the runs are merged by threads of one warp. What it does depends on no value.
#pragma once
#include "select.cuh"

namespace rk {
namespace cuda {

constexpr int kRunRows = 32;
constexpr int kMergedRows = kRunRows * kWarp;

// Shared memory holds a value of every thread kCellStride apart, those of a column's runs kRunStride apart: so the
// lanes of a warp meet in no bank, whether they hold neighbouring columns, runs of a column, or neighbours in rank.
template <class S, int kRuns>
struct MergeShape {
  static constexpr int kThreads = sizeof(S) == 8 ? 128 : 256, kColumns = kThreads / kRuns;
  static constexpr int kGap = kWarp / kRuns, kRunStride = kColumns + kGap, kCellStride = kRuns * kRunStride + kGap;
  static constexpr int kRows = kRuns * kRunRows, kParts = kColumns > kWarp ? kColumns / kWarp : 1;
  static constexpr int kBlocks = sizeof(S) == 8 ? 2 : 3;
  static constexpr bool kKeeps = sizeof(S) < 8;  // distances, until the block ends: in shared memory
  static_assert(kKeeps || kParts == 1);
};

// A column's sorted values where its runs left them.
template <class C, class Shape>
struct SortedRuns {
  C* cell;
  __device__ __forceinline__ C& operator[](int64_t rank) const {
    const int r = static_cast<int>(rank);
    return cell[r % kRunRows * Shape::kCellStride + r / kRunRows * Shape::kRunStride];
  }
};

// The smaller of two values, or the greater: of two zeros, either.
template <class C>
__device__ __forceinline__ C kept_of(C mine, C other, bool greater) {
  return (mine < other) == greater ? other : mine;
}

// Of two neighbouring sorted sequences of kRuns / 2 threads each, the lower half of both in the lower threads. Each is
// then no longer sorted, but rises and falls only once.
template <int kRuns, class C>
__device__ __forceinline__ void split_halves(C (&x)[kRunRows], int run) {
  const bool upper = run & (kRuns / 2);
#pragma unroll
  for (int i = 0; i < kRunRows / 2; ++i) {
    const int k = kRunRows - 1 - i;
    const C low = __shfl_xor_sync(0xffffffffu, x[k], kRuns - 1), high = __shfl_xor_sync(0xffffffffu, x[i], kRuns - 1);
    x[i] = kept_of(x[i], low, upper);
    x[k] = kept_of(x[k], high, upper);
  }
}

// Sorts what rises and falls once over kRuns threads.
template <int kRuns, class C>
__device__ __forceinline__ void sort_halves(C (&x)[kRunRows], int run) {
#pragma unroll
  for (int step = kRuns / 2; step > 0; step /= 2) {
    const bool upper = run & step;
#pragma unroll
    for (int i = 0; i < kRunRows; ++i) x[i] = kept_of(x[i], __shfl_xor_sync(0xffffffffu, x[i], step), upper);
  }
#pragma unroll
  for (int step = kRunRows / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < kRunRows; ++i)
      if ((i & step) == 0) exchange(x[i], x[i + step]);
}

// Sorts groups of kRuns runs, each of which is sorted.
template <int kRuns, class C>
__device__ __forceinline__ void merge_runs(C (&x)[kRunRows], int run) {
  if constexpr (kRuns > 1) {
    merge_runs<kRuns / 2>(x, run);
    split_halves<kRuns>(x, run);
    sort_halves<kRuns / 2>(x, run);
  }
}

// The greatest value of the lower half of kRuns runs, and the least of the upper one, once they are split.
template <int kRuns, class C>
__device__ __forceinline__ void middle_ranks(const C (&x)[kRunRows], int run, C& low, C& high) {
  const bool upper = run & (kRuns / 2);
  C edge = x[0];
#pragma unroll
  for (int i = 1; i < kRunRows; ++i) {
    C smaller = edge, greater = x[i];
    exchange(smaller, greater);
    edge = upper ? smaller : greater;
  }
#pragma unroll
  for (int step = kRuns / 4; step > 0; step /= 2)
    edge = kept_of(edge, __shfl_xor_sync(0xffffffffu, edge, step), !upper);
  const C other = __shfl_xor_sync(0xffffffffu, edge, kRuns / 2);
  low = upper ? other : edge;
  high = upper ? edge : other;
}

// Adds up each of kCount values over kLanes neighbours of a warp: of those left in a lane, `first` is the first one's
// index and their number kCount / kLanes, or one that several lanes have.
template <int kLanes, int kCount>
__device__ __forceinline__ int add_over_lanes(double (&x)[kCount], int lane) {
  int first = 0;
#pragma unroll
  for (int step = kLanes / 2, count = kCount; step > 0; step /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = lane & step;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const double sent = upper ? x[i] : x[i + count], mine = upper ? x[i + count] : x[i];
        x[i] = mine + __shfl_xor_sync(0xffffffffu, sent, step);
      }
      first += upper ? count : 0;
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
    }
  }
  return first;
}

// partial[i] += squared distance of row i of a tile to a centre; every thread reads the rows of a run. Warps that share
// a run have sums of their own, kParts of each, so that the order of the sums is fixed.
template <class S, class Shape>
__device__ __forceinline__ void add_run_distances(const Table& rows, const Tile& tile, const double* centre,
                                                  double scale, double* partial) {
  constexpr int kAtOnce = 8, kLanes = Shape::kColumns / Shape::kParts;
  constexpr int kLeft = kAtOnce > kLanes ? kAtOnce / kLanes : 1, kCopies = kLanes > kAtOnce ? kLanes / kAtOnce : 1;
  const int n = static_cast<int>(rows.n), run = threadIdx.x / Shape::kColumns, at = threadIdx.x % Shape::kColumns;
  const bool valid = at < tile.count;
  const int64_t column = tile.first + (valid ? at : tile.count - 1);
  const double origin = centre[at];
  double* const part = partial + at / kLanes * Shape::kRows;
#pragma unroll 1
  for (int begin = run * kRunRows; begin < (run + 1) * kRunRows; begin += kAtOnce) {
    double x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      x[i] = static_cast<double>(widened(rows.row<S>(tile.segment, begin + i < n ? begin + i : n - 1)[column]));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const double difference = (x[i] - origin) * scale;
      x[i] = valid ? difference * difference : 0.0;
    }
    const int row = begin + add_over_lanes<kLanes>(x, threadIdx.x % kLanes);
#pragma unroll
    for (int i = 0; i < kLeft; ++i)
      if (row + i < n && threadIdx.x % kCopies == 0) part[row + i] += x[i];
  }
}

// Reads a column of a run of rows, filled up with infinities; returns how many NaN, which are infinities now, it held.
template <class S>
__device__ __forceinline__ int fill_run(const Selection& args, int64_t segment, int64_t column, int first,
                                        ComputeOf<S> (&x)[kRunRows]) {
  using C = ComputeOf<S>;
  const int n = static_cast<int>(args.rows.n);
  C check = 0;
#pragma unroll
  for (int i = 0; i < kRunRows; ++i) {  // without a branch: the last row stands for those that are not there
    const int row = first + i;
    x[i] = widened(args.rows.row<S>(segment, row < n ? row : n - 1)[column]);
  }
#pragma unroll
  for (int i = 0; i < kRunRows; ++i) {
    check = checked(x[i], check);
    const int row = first + i;
    if (row >= n) x[i] = row < n + args.low_pads ? -infinity<C>() : infinity<C>();
  }
  if (check == 0) return 0;
  for (int row = first; row < n && row < first + kRunRows; ++row)
    if (!is_finite(widened(args.rows.row<S>(segment, row)[column]))) set_flag(args.flags, row);
  return replace_nan(x);
}

// The parts of each row's sum added up.
template <class Shape>
__device__ __forceinline__ void leave_distances(const double* kept, int n, double* partial) {
  for (int i = threadIdx.x; i < n; i += Shape::kThreads) {
    double sum = kept[i];
    for (int part = 1; part < Shape::kParts; ++part) sum += kept[part * Shape::kRows + i];
    partial[i] = sum;
  }
}

template <class S, int kRuns, bool kMedian>
__global__ void __launch_bounds__(MergeShape<S, kRuns>::kThreads, MergeShape<S, kRuns>::kBlocks)
    select_by_merging(const Selection args) {
  using C = ComputeOf<S>;
  using Shape = MergeShape<S, kRuns>;
  constexpr int kColumns = Shape::kColumns;
  RK_SHARED(C, cells, [kRunRows * Shape::kCellStride]);
  RK_SHARED(int, nan_cells_of, [kRuns * Shape::kRunStride]);
  RK_SHARED(double, centre, [kColumns]);
  RK_SHARED(double, kept_distances, [Shape::kKeeps ? Shape::kParts * Shape::kRows : 1]);
  const Table& rows = args.rows;
  const int n = static_cast<int>(rows.n);
  double* const distances = Shape::kKeeps ? kept_distances : args.partials + blockIdx.x * rows.n;
  if (Shape::kKeeps)
    for (int i = threadIdx.x; i < Shape::kParts * Shape::kRows; i += Shape::kThreads) kept_distances[i] = 0;
  // Threads read neighbouring columns, and merge neighbouring runs.
  const int read_run = threadIdx.x / kColumns, read_column = threadIdx.x % kColumns;
  const int run = threadIdx.x % kRuns, at = threadIdx.x / kRuns;
  const int from = read_run * Shape::kRunStride + read_column, to = run * Shape::kRunStride + at;
  for (int64_t t = blockIdx.x; t < rows.n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(rows, t, kColumns);
    const int64_t column = tile.first + (read_column < tile.count ? read_column : tile.count - 1);
    C x[kRunRows];
    int nan_cells = fill_run<S>(args, tile.segment, column, read_run * kRunRows, x);
    sort_wires<Network<kRunRows, false>>(x);
#pragma unroll
    for (int i = 0; i < kRunRows; ++i) cells[i * Shape::kCellStride + from] = x[i];
    nan_cells_of[from] = nan_cells;
    const bool any_nan = __syncthreads_or(nan_cells != 0);
#pragma unroll
    for (int i = 0; i < kRunRows; ++i) x[i] = cells[i * Shape::kCellStride + to];
    nan_cells = 0;
    if (any_nan)
      for (int r = 0; r < kRuns; ++r) nan_cells += nan_cells_of[r * Shape::kRunStride + at];
    S result{};
    if constexpr (kMedian) {
      merge_runs<kRuns / 2>(x, run);
      split_halves<kRuns>(x, run);
      C low, high;
      middle_ranks<kRuns>(x, run, low, high);
      result = median_of<S>(low, high, n, nan_cells, args);
    } else {
      merge_runs<kRuns>(x, run);
#pragma unroll
      for (int i = 0; i < kRunRows; ++i) cells[i * Shape::kCellStride + to] = x[i];
      __syncwarp();
      result = window_of<S, C>(SortedRuns<C, Shape>{cells + at}, Lanes<kRuns>{run}, n, nan_cells, args);
    }
    if (run == 0 && at < tile.count) {
      if (args.out) static_cast<S*>(args.out[tile.segment])[tile.first + at - rows.first] = result;
      if (args.partials) centre[at] = widened(result);
    }
    __syncthreads();
    if (args.partials) {
      add_run_distances<S, Shape>(rows, tile, centre, args.scale, distances);
      __syncthreads();
    }
  }
  if (Shape::kKeeps && args.partials) leave_distances<Shape>(kept_distances, n, args.partials + blockIdx.x * rows.n);
}

}  // namespace cuda
}  // namespace rk
