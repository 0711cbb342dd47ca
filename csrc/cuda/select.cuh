// Device code of select_columns: a column's values sorted in registers by a network for up to 64 rows, a value of any
// rank found by counting above that and for rows that stand for several cells.
#pragma once
#include "../common/networks.h"
#include "device.cuh"

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

// ---- sorting networks ------------------------------------------------------------------------------------

__device__ __forceinline__ void exchange(float& low, float& high) {
#if defined(__CUDA_ARCH__)
  const float smaller = fminf(low, high);
  high = fmaxf(low, high);
  low = smaller;
#else
  const bool swap = high < low;
  const float smaller = swap ? high : low;
  high = swap ? low : high;
  low = smaller;
#endif
}
// One comparison and four selections: fmin and fmax of float64 are longer than that.
__device__ __forceinline__ void exchange(double& low, double& high) {
  const bool swap = high < low;
  const double smaller = swap ? high : low;
  high = swap ? low : high;
  low = smaller;
}

// N wires, pruned to the two middle ranks or for all.
template <int N, bool kMedian>
struct Network {
  static constexpr FixedNetwork<N> value{kMedian ? N / 2 - 1 : 0, kMedian ? N / 2 + 1 : N};
};

template <class Net, class C, int N, int... I>
__device__ __forceinline__ void sort_wires(C (&x)[N], std::integer_sequence<int, I...>) {
  (exchange(x[Net::value.net[I].low], x[Net::value.net[I].high]), ...);
}
template <class Net, class C, int N>
__device__ __forceinline__ void sort_wires(C (&x)[N]) {
  sort_wires<Net>(x, std::make_integer_sequence<int, Net::value.count>{});
}

// Networks of all rows are fewer than those of medians: they are larger, and a compiler takes its time for each.
using MedianSizes = std::integer_sequence<int, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64>;
using SortSizes = std::integer_sequence<int, 8, 16, 24, 32, 48, 64>;

// Rows that every use of the network of a size has: wires below are always rows.
template <int... kSizes>
constexpr int least_rows(int size, std::integer_sequence<int, kSizes...>) {
  int least = 1;
  ((kSizes < size ? least = kSizes + 1 : 0), ...);
  return least;
}

// call(std::integral_constant) for the size that sorts n rows.
template <class F, int... kSizes>
void by_network_size(std::integer_sequence<int, kSizes...>, int64_t n, F&& call) {
  bool found = false;
  ((!found && n <= kSizes ? (found = true, call(std::integral_constant<int, kSizes>{})) : void()), ...);
}

// How many wires are -inf so that the lower median of n values is that of all wires.
constexpr int median_pads(int size, int64_t n) { return (size - static_cast<int>(n)) / 2; }

// Stays 0 as long as all values are numbers.
__device__ __forceinline__ float checked(float x, float check) { return fmaf(x, 0.0f, check); }
__device__ __forceinline__ double checked(double x, double check) { return fma(x, 0.0, check); }

// Makes +inf of NaN, which sort alike, and counts them.
template <class C, int N>
__device__ __forceinline__ int replace_nan(C (&x)[N]) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool is_nan = x[i] != x[i];
    count += is_nan;
    x[i] = is_nan ? infinity<C>() : x[i];
  }
  return count;
}

// A column's sorted values in shared memory, kStride apart.
template <class C, int kStride>
struct Sorted {
  C* cell;
  __device__ __forceinline__ C& operator[](int64_t rank) const { return cell[rank * kStride]; }
};

// Mean of sorted[lo..hi): summed as differences from the smallest, so that a common offset costs no digits; where that
// overflows or meets an infinity, as a plain scaled sum. It never leaves the range of its values.
template <class C, int kStride>
__device__ C window_mean(const Sorted<C, kStride>& sorted, int64_t lo, int64_t hi) {
  const C first = sorted[lo], last = sorted[hi - 1];
  if (first == last) return first;
  if (hi - lo == 2) return middle_of(first, last);
  const double low = static_cast<double>(first), high = static_cast<double>(last);
  const double count = static_cast<double>(hi - lo);
  double sum = 0;
  for (int64_t r = lo + 1; r < hi; ++r) sum += static_cast<double>(sorted[r]) - low;
  double mean = low + sum / count;
  if (!is_finite(mean)) {
    mean = 0;
    for (int64_t r = lo; r < hi; ++r) mean += static_cast<double>(sorted[r]) / count;
  }
  return static_cast<C>(mean < low ? low : mean > high ? high : mean);
}

// Mean of the `nearest` values nearest to the mean m of [lo, hi): consecutive ranks, of which one is not among them
// where that many ranks above lies a value nearer to m.
template <class C, int kStride>
__device__ C nearest_mean(const Sorted<C, kStride>& sorted, int64_t n, int64_t lo, int64_t hi, int64_t nearest) {
  const C m = window_mean(sorted, lo, hi);
  int64_t begin = 0;
  for (int64_t k = 0; k + nearest < n; ++k) {
    const C low = sorted[k], high = sorted[k + nearest];
    begin += high - m < m - low || (low == -infinity<C>() && high < infinity<C>());
  }
  return is_finite(m) ? window_mean(sorted, begin, begin + nearest) : m;
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
  static constexpr int kBlocks = (kValues <= 64 ? (N == 64 ? 3 : 4) : kDoubles || N == 64 ? 2 : 3) * 128 / kThreads;
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
        C value;
        if constexpr (kMedian) {
          const C low = x[v][N / 2 - 1], high = x[v][N / 2];
          value = args.hi - args.lo == 2 ? middle_of(low, high) : args.lo == (n - 1) / 2 ? low : high;
        } else {
          const Sorted<C, Shape::kThreads> sorted{cells + threadIdx.x};
#pragma unroll
          for (int i = 0; i < N; ++i) sorted[i] = x[v][i];
          value = args.nearest ? nearest_mean(sorted, n, args.lo, args.hi, args.nearest)
                               : window_mean(sorted, args.lo, args.hi);
        }
        // A window that reaches a NaN gives NaN, and so do nearest values of which one is a NaN.
        if (nan_cells > n - (args.hi > args.nearest ? args.hi : args.nearest)) value = not_a_number<C>();
        result.cell[v] = narrowed<S>(value);
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

// ---- counting --------------------------------------------------------------------------------------------

// Floating-point numbers as unsigned integers in the same order, NaN of either sign above all.
__device__ __forceinline__ uint32_t float_bits(float x) { return float_to_bits(x); }
__device__ __forceinline__ uint64_t float_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) { return bits_to_float(bits); }
__device__ __forceinline__ double float_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
template <class C>
using BitsOf = decltype(float_bits(C{}));
template <class Bits>
constexpr Bits kTopBit = Bits{1} << (8 * sizeof(Bits) - 1);

template <class C>
__device__ __forceinline__ BitsOf<C> key_of(C x) {
  using Bits = BitsOf<C>;
  const Bits bits = float_bits(x);
  return x != x ? ~Bits{0} : bits & kTopBit<Bits> ? ~bits : bits | kTopBit<Bits>;
}
template <class C>
__device__ __forceinline__ C value_of(BitsOf<C> key) {
  using Bits = BitsOf<C>;
  return float_of(key & kTopBit<Bits> ? key & ~kTopBit<Bits> : ~key);
}
// A distance as an integer in the same order: that of an infinite value is above a number's that overflows, and that of
// a NaN above all.
template <class C>
__device__ __forceinline__ BitsOf<C> distance_key(C x, C m) {
  if (x != x) return ~BitsOf<C>{0};
  return (float_bits(x - m) & ~kTopBit<BitsOf<C>>)+!is_finite(x);
}

constexpr int kCountedColumns = kWarp;  // of a tile: a lane each; every warp counts among some of the rows
constexpr int kMaxWarps = 16;
constexpr int kRowsOfWarp = 16;  // at least, where there are fewer warps than that

// Shared memory of a block that counts, one slot for each column: sums that every warp adds to (three sets take turns:
// one is read while the next is filled and the one after is cleared), and a number of every warp.
template <class Count>
struct Tally {
  Count (*counts)[kCountedColumns];    // 3
  uint64_t (*slots)[kCountedColumns];  // kMaxWarps
  int turn;

  __device__ void begin() {
    turn = 0;
    if (threadIdx.x < kWarp)
      for (int set = 0; set < 3; ++set) counts[set][threadIdx.x] = 0;
    __syncthreads();
  }
  // The sum over the warps.
  __device__ Count total(Count count) {
    const int lane = threadIdx.x % kWarp;
    atomicAdd(&counts[turn][lane], count);
    __syncthreads();
    count = counts[turn][lane];
    if (threadIdx.x < kWarp) counts[(turn + 2) % 3][lane] = 0;
    turn = (turn + 1) % 3;
    return count;
  }
  // Joins a number of every warp, in the order of the warps.
  template <class T, class F>
  __device__ T joined(T number, F&& join) {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    __syncthreads();
    memcpy(&slots[threadIdx.x / kWarp][lane], &number, sizeof(T));
    __syncthreads();
    T result{};
    for (int w = 0; w < warps; ++w) {
      memcpy(&number, &slots[w][lane], sizeof(T));
      result = w == 0 ? number : join(result, number);
    }
    return result;
  }
  __device__ double sum(double number) {
    return joined(number, [](double a, double b) { return a + b; });
  }
};

// A tile's values as the warps share them out: in shared memory, or, of very many rows, read again and again.
template <class S, bool kKept>
struct Values {
  using C = ComputeOf<S>;
  using Bits = BitsOf<C>;
  const Table& rows;
  Bits* key;  // (n, kCountedColumns)
  Tile tile;

  __device__ __forceinline__ Bits read(int i) const {
    const int lane = threadIdx.x % kWarp;
    return lane < tile.count ? key_of(widened(rows.row<S>(tile.segment, i)[tile.first + lane])) : 0;
  }
  __device__ __forceinline__ void begin(int64_t index) {
    tile = tile_at(rows, index, kCountedColumns);
    if constexpr (kKept) {
      const int n = static_cast<int>(rows.n), warps = blockDim.x / kWarp;
#pragma unroll 4
      for (int i = threadIdx.x / kWarp; i < n; i += warps) key[i * kCountedColumns + threadIdx.x % kWarp] = read(i);
    }
  }
  // call(key, row) for each of this thread's values, which only it reads.
  template <class F>
  __device__ __forceinline__ void each(F&& call) const {
    const int n = static_cast<int>(rows.n), warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 4
    for (int i = threadIdx.x / kWarp; i < n; i += warps) call(kKept ? key[i * kCountedColumns + lane] : read(i), i);
  }
};

template <class S, bool kWeighted, bool kKept>
__global__ void __launch_bounds__(kWarp* kMaxWarps, 1) select_by_counting(const Selection args) {
  using C = ComputeOf<S>;
  using Bits = BitsOf<C>;
  using Count = std::conditional_t<kWeighted, unsigned long long, unsigned>;
  RK_DYNAMIC_SHARED(Bits, keys);
  RK_SHARED(Count, counts, [3][kCountedColumns]);
  RK_SHARED(uint64_t, slots, [kMaxWarps][kCountedColumns]);
  RK_SHARED(C, centre, [kCountedColumns]);
  const int lane = threadIdx.x % kWarp;
  Tally<Count> tally{counts, slots, 0};
  tally.begin();
  Values<S, kKept> values{args.rows, keys, {}};
  const auto weight = [&](int row) {
    if constexpr (kWeighted)
      return static_cast<Count>(args.multiplicities[row]);
    else
      return Count{1};
  };

  for (int64_t t = blockIdx.x; t < args.rows.n_tiles; t += gridDim.x) {
    values.begin(t);
    const bool valid = lane < values.tile.count;
    values.each([&](Bits key, int row) {
      if (valid && !is_finite(value_of<C>(key))) set_flag(args.flags, row);
    });
    const auto count = [&](auto&& counted) {
      Count cells = 0;
      values.each([&](Bits key, int row) {
        if (counted(key)) cells += weight(row);
      });
      return tally.total(cells);
    };
    // The largest key below which at most `rank` cells lie is that of the rank: found bit by bit.
    const auto find = [&](auto&& key_for, Count rank) {
      Bits found = 0;
#pragma unroll 1
      for (Bits bit = kTopBit<Bits>; bit != 0; bit >>= 1) {
        const Bits pivot = found | bit;
        if (count([&](Bits key) { return key_for(key) < pivot; }) <= rank) found = pivot;
      }
      return found;
    };

    // The ends of the window [lo, hi), whose cells are in a second round the values nearest to the first one's mean.
    Count lo = static_cast<Count>(args.lo), hi = static_cast<Count>(args.hi), up_to_first;
    Bits first, last;
    C unusual = 0;  // a centre that is no finite number is itself the result
#pragma unroll 1
    for (bool near = false;; near = true) {
      const bool few = !near && args.hi - args.lo <= 2;
      last = first = find([](Bits key) { return key; }, lo);
      up_to_first = count([&](Bits key) { return key <= first; });
      if (!few) {
        last = find([](Bits key) { return key; }, hi - 1);
      } else if (args.hi - args.lo == 2) {
        Bits next = ~Bits{0};
        values.each([&](Bits key, int row) {
          if (key > first && key < next && weight(row) > 0) next = key;
        });
        next = tally.joined(next, [](Bits a, Bits b) { return a < b ? a : b; });
        if (up_to_first < hi) last = next;
      }
      if (near || !args.nearest) break;
      const C middle = middle_of(value_of<C>(first), value_of<C>(last));
      const C m = is_finite(middle) ? middle : C{0};
      unusual = middle - m;
      // The values taken have consecutive ranks, and the lowest follows from how many lower ones are left out: those
      // farther than the cut, and of those as far as it the ones that find no room.
      const Count nearest = static_cast<Count>(args.nearest);
      const auto away = [&](Bits key) { return distance_key(value_of<C>(key), m); };
      const Bits cut = find(away, nearest - 1);
      const Count inside = count([&](Bits key) { return away(key) < cut; });
      const Count tied = count([&](Bits key) { return value_of<C>(key) < m && away(key) == cut; });
      const Count missing = nearest - inside;
      lo = count([&](Bits key) { return value_of<C>(key) < m && away(key) > cut; });
      if (missing < tied) lo += tied - missing;
      hi = lo + nearest;
      if (cut == ~Bits{0}) unusual = 0;  // a NaN is taken
    }
    const Count below_last = count([&](Bits key) { return key < last; });
    const double low = static_cast<double>(value_of<C>(first)), high = static_cast<double>(value_of<C>(last));
    const double copies_low = static_cast<double>((up_to_first < hi ? up_to_first : hi) - lo);
    const double copies_high = first == last ? 0 : static_cast<double>(hi - below_last);
    double sum = 0;
    values.each([&](Bits key, int row) {
      if (key > first && key < last)
        sum += static_cast<double>(weight(row)) * (static_cast<double>(value_of<C>(key)) - low);
    });
    sum = tally.sum(sum) + (copies_high > 0 ? copies_high * (high - low) : 0);
    const bool plainly = !is_finite(sum) || !is_finite(low);
    double plain = 0;
    if (__syncthreads_or(plainly)) {  // differences overflow, or meet an infinity
      values.each([&](Bits key, int row) {
        if (key > first && key < last)
          plain += static_cast<double>(value_of<C>(key)) * args.share * static_cast<double>(weight(row));
      });
      plain = low * args.share * copies_low + tally.sum(plain);
      if (copies_high > 0) plain += high * args.share * copies_high;
    }
    const double mean = plainly ? plain : low + sum / static_cast<double>(hi - lo);
    C value = static_cast<C>(mean < low ? low : mean > high ? high : mean);
    if (up_to_first == below_last && copies_low == copies_high)
      value = middle_of(value_of<C>(first), value_of<C>(last));
    if (first == last) value = value_of<C>(first);
    if (unusual != 0) value = unusual;
    const S stored = narrowed<S>(value);
    if (threadIdx.x < kWarp && valid) {
      if (args.out) static_cast<S*>(args.out[values.tile.segment])[values.tile.first - args.rows.first + lane] = stored;
      centre[lane] = widened(stored);
    }
    if (args.partials) {
      __syncthreads();
      add_sq_distances<S>(args.rows, values.tile, centre, args.scale, args.partials + blockIdx.x * args.rows.n);
      __syncthreads();
    }
  }
}

}  // namespace cuda
}  // namespace rk
