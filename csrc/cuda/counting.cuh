// Device code of select_columns for more rows than a warp can sort, or than a thread of rows that stand for several
// cells: the value of a rank is found bit by bit, by counting how many lie below.
#pragma once
#include "select.cuh"

namespace rk {
namespace cuda {

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
// Distances from the middle of a and b, neighbours in rank, less half of what lies between: those from b below, and
// from a above. As integers in the same order: an infinite value's is above a number's that overflows, a NaN's above
// all; and what the rounding of one lost, which tells those apart that are rounded to the same number.
template <class C>
struct Distances {
  using Bits = BitsOf<C>;
  C a, b, half;  // halves of large numbers, so that differences do not overflow

  __device__ __forceinline__ Distances(C low, C high) : a(low), b(high) {
    half = (a < 0 ? -a : a) > static_cast<C>(0x1p100) || (b < 0 ? -b : b) > static_cast<C>(0x1p100)
               ? static_cast<C>(0.5)
               : C{1};
  }
  __device__ __forceinline__ C rounded(C x, C& lost) const {
    C difference;
    two_sum((x <= a ? b : x) * half, (x <= a ? -x : -a) * half, difference, lost);
    return difference;
  }
  __device__ __forceinline__ Bits key(C x) const {
    if (x != x) return ~Bits{0};
    C lost;
    return (float_bits(rounded(x, lost)) & ~kTopBit<Bits>)+!is_finite(x);
  }
  __device__ __forceinline__ Bits lost_key(C x) const {
    C lost;
    rounded(x, lost);
    return key_of(is_finite(lost) ? lost + C{0} : C{0});
  }
};

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

template <bool kWeighted>
using CountOf = std::conditional_t<kWeighted, unsigned long long, unsigned>;

// The selection from a column, which all threads of a lane make together.
template <class S, bool kWeighted, bool kKept>
struct Counting {
  using C = ComputeOf<S>;
  using Bits = BitsOf<C>;
  using Count = CountOf<kWeighted>;
  const Selection& args;
  Tally<Count> tally;
  Values<S, kKept> values;
  // The ends of the window [lo, hi) of cells, how many cells lie up to the first, and the mean of them.
  Count lo, hi, up_to_first;
  Bits first, last;
  double value, lost;
  double unusual;  // a centre that is no finite number is itself the result

  __device__ __forceinline__ Counting(const Selection& selection, Count (*counts)[kCountedColumns],
                                      uint64_t (*slots)[kCountedColumns], Bits* keys)
      : args(selection), tally{counts, slots, 0}, values{selection.rows, keys, {}} {
    tally.begin();
  }
  __device__ __forceinline__ Count weight(int row) const {
    if constexpr (kWeighted)
      return static_cast<Count>(args.multiplicities[row]);
    else
      return Count{1};
  }
  template <class F>
  __device__ __forceinline__ Count count(F&& counted) {
    Count cells = 0;
    values.each([&](Bits key, int row) {
      if (counted(key)) cells += weight(row);
    });
    return tally.total(cells);
  }
  // The largest key below which at most `rank` cells lie is that of the rank: found bit by bit.
  template <class F>
  __device__ __forceinline__ Bits find(F&& key_for, Count rank) {
    Bits found = 0;
#pragma unroll 1
    for (Bits bit = kTopBit<Bits>; bit != 0; bit >>= 1) {
      const Bits pivot = found | bit;
      if (count([&](Bits key) { return key_for(key) < pivot; }) <= rank) found = pivot;
    }
    return found;
  }
  __device__ __forceinline__ Bits find(Count rank) {
    return find([](Bits key) { return key; }, rank);
  }

  // `few`: one cell or two.
  __device__ __forceinline__ void find_ends(bool few) {
    last = first = find(lo);
    up_to_first = count([&](Bits key) { return key <= first; });
    if (!few) {
      last = find(hi - 1);
    } else if (args.hi - args.lo == 2) {
      Bits next = ~Bits{0};
      values.each([&](Bits key, int row) {
        if (key > first && key < next && weight(row) > 0) next = key;
      });
      next = tally.joined(next, [](Bits a, Bits b) { return a < b ? a : b; });
      if (up_to_first < hi) last = next;
    }
  }
  __device__ __forceinline__ void find_mean() {
    const Count below_last = count([&](Bits key) { return key < last; });
    const double low = static_cast<double>(value_of<C>(first)), high = static_cast<double>(value_of<C>(last));
    const double copies_low = static_cast<double>((up_to_first < hi ? up_to_first : hi) - lo);
    const double copies_high = first == last ? 0 : static_cast<double>(hi - below_last);
    const double share = 1.0 / static_cast<double>(hi - lo);  // of a cell in the mean
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
          plain += static_cast<double>(value_of<C>(key)) * share * static_cast<double>(weight(row));
      });
      plain = low * share * copies_low + tally.sum(plain);
      if (copies_high > 0) plain += high * share * copies_high;
    }
    const double mean = plainly ? plain : moved(low, sum, static_cast<double>(hi - lo), lost);
    if (plainly) lost = 0;
    value = mean < low ? low : mean > high ? high : mean;
    if (up_to_first == below_last && copies_low == copies_high)
      value = static_cast<double>(middle_of(value_of<C>(first), value_of<C>(last)));
    if (first == last) value = low;
  }
  // Moves the window to the values nearest to the mean: from the lowest rank on of which the value so many ranks above
  // is no nearer, found bit by bit.
  __device__ __forceinline__ void move_near_mean() {
    const Count nearest = static_cast<Count>(args.nearest);
    const C mean = static_cast<C>(is_finite(value) ? value : 0.0);
    const Twice<C> middle(mean, mean, (value - static_cast<double>(mean)) + lost);
    const Count last_rank = static_cast<Count>(args.rows.n) - 1, places = last_rank + 1 - nearest;
    if (!is_finite(value)) unusual = value;
    const C farthest = value_of<C>(find(nearest - 1));
    if (farthest != farthest) unusual = static_cast<double>(farthest);
    lo = 0;
    Count step = 1;
    while (step <= places / 2) step *= 2;
#pragma unroll 1
    for (; step != 0 && places != 0; step /= 2) {
      const Count rank = lo + step - 1;
      const C lower = value_of<C>(find(rank < last_rank ? rank : last_rank));
      const Count above = rank + nearest < last_rank ? rank + nearest : last_rank;
      const C upper = value_of<C>(find(above));
      if (rank < places && middle.more_than(lower, upper)) lo += step;
    }
    hi = lo + nearest;
  }
  // Moves the window to the values nearest to the middle of its ends. They have consecutive ranks, and the lowest
  // follows from how many lower ones are left out: those farther than the cut, and of those as far as it the ones that
  // find no room.
  __device__ __forceinline__ void move_near_middle() {
    const Count nearest = static_cast<Count>(args.nearest);
    const C a = value_of<C>(first), b = value_of<C>(last);
    const bool usual = is_finite(a) && is_finite(b);
    if (!usual) unusual = static_cast<double>(a + b);
    const Distances<C> distances(usual ? a : C{0}, usual ? b : C{0});
    const auto away = [&](Bits key) { return distances.key(value_of<C>(key)); };
    const Bits cut = find(away, nearest - 1);
    Count missing = nearest - count([&](Bits key) { return away(key) < cut; });
    const Count as_far = count([&](Bits key) { return away(key) == cut; });
    const bool tells = __syncthreads_or(as_far > missing);
    const auto finer = [&](Bits key) { return tells ? distances.lost_key(value_of<C>(key)) : Bits{0}; };
    Bits finer_cut = 0;
    if (tells) {
      finer_cut = find([&](Bits key) { return away(key) == cut ? finer(key) : ~Bits{0}; }, missing - 1);
      missing -= count([&](Bits key) { return away(key) == cut && finer(key) < finer_cut; });
    }
    const auto lower = [&](Bits key) { return value_of<C>(key) <= distances.a; };
    const Count tied = count([&](Bits key) { return lower(key) && away(key) == cut && finer(key) == finer_cut; });
    lo = count(
        [&](Bits key) { return lower(key) && (away(key) > cut || (away(key) == cut && finer(key) > finer_cut)); });
    if (missing < tied) lo += tied - missing;
    hi = lo + nearest;
    if (cut == ~Bits{0}) unusual = 0;  // a NaN is taken
  }
  // In a second round the cells are the values nearest to what the first one found: the middle of the window's ends
  // where these are all, or else the mean.
  __device__ __forceinline__ double run() {
    lo = static_cast<Count>(args.lo);
    hi = static_cast<Count>(args.hi);
    value = lost = unusual = 0;
#pragma unroll 1
    for (bool near = false;; near = true) {
      const bool few = !near && args.hi - args.lo <= 2;
      find_ends(few);
      if (near || !args.nearest || !few) find_mean();
      if (near || !args.nearest) break;
      if (few)
        move_near_middle();
      else
        move_near_mean();
    }
    return unusual != 0 ? unusual : value;
  }
};

template <class S, bool kWeighted, bool kKept>
__global__ void __launch_bounds__(kWarp* kMaxWarps, 1) select_by_counting(const Selection args) {
  using C = ComputeOf<S>;
  using Bits = BitsOf<C>;
  RK_DYNAMIC_SHARED(Bits, keys);
  RK_SHARED(CountOf<kWeighted>, counts, [3][kCountedColumns]);
  RK_SHARED(uint64_t, slots, [kMaxWarps][kCountedColumns]);
  RK_SHARED(double, centre, [kCountedColumns]);
  const int lane = threadIdx.x % kWarp;
  Counting<S, kWeighted, kKept> counting(args, counts, slots, keys);
  const auto& values = counting.values;
  for (int64_t t = blockIdx.x; t < args.rows.n_tiles; t += gridDim.x) {
    counting.values.begin(t);
    const bool valid = lane < values.tile.count;
    values.each([&](Bits key, int row) {
      if (valid && !is_finite(value_of<C>(key))) set_flag(args.flags, row);
    });
    const S stored = rounded<S>(counting.run());
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
