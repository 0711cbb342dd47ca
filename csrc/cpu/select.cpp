// Compiled once per instruction set: selection with one column in each SIMD lane.
// Up to 32 rows a sorting network is unrolled in registers (medians pruned for the exact n; other windows as a full
// sort padded to a multiple of 4 rows); above that the window's ends are found in two sorted parts (merge.h), from 257
// rows on by counting (pivot.h). With multiplicities values and their rows are sorted by a network built at run time.
// 16-bit values are sorted as integers, twice as many to a vector.
#include "select.h"

#include <stdlib.h>

#include "../common/networks.h"
#include "merge.h"
#include "pivot.h"
#include "sums.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int kUnrolledRows = 32;
// How far ahead each row is fetched: many streams defeat the hardware (10 rows of float64: 1.3 reads with 8, 1.2 so).
constexpr int kPrefetchVectors = kVectorBytes == 64 ? 16 : 8;
// How many rows the hardware follows; above, whole runs of rows are fetched (Ahead). Median of 32 rows: 1.0 against 1.3
// reads on Granite Rapids, but 2.3 against 1.9 on Zen 3.
constexpr int kFollowedRows = kVectorBytes == 64 ? 32 : 16;

// ---- from sorted values to the result ------------------------------------------------------------------

// Some values' sums over their number, times kRoom, as they were summed where plain sums overflow.
RK_INLINE F64 shrunken_mean(const DoubledSum& sum, double count) { return grown(sum, count, false); }

// Mean of sorted[lo..hi) per lane, written to out: a sum divided once, and rounded once. Of float64 values differences
// from the smallest are summed, so that a large common offset costs no digits and equal values come back; float64 holds
// sums of float32 values themselves. What is rounded to 16 bits next is so as well, in the end (narrow).
template <class C>
RK_INLINE void store_window_mean(const typename Simd<C>::V* sorted, int64_t lo, int64_t hi, bool narrow, C* out) {
  using V = typename Simd<C>::V;
  if (hi - lo == 1) {
    store(out, sorted[lo]);
    return;
  }
  if (hi - lo == 2) {
    const V a = sorted[lo], b = sorted[lo + 1];
    V middle = (a + b) * static_cast<C>(0.5);
    if (__builtin_expect(any_nan(middle * static_cast<C>(0)), false))  // only where it overflows: halves may vanish
      middle = middle - middle == 0 ? middle : a * static_cast<C>(0.5) + b * static_cast<C>(0.5);
    store(out, middle);
    return;
  }
  constexpr int lanes = Simd<C>::lanes;
  if (sizeof(C) == 4 && narrow && hi - lo <= kUnrolledRows) {
    // float32 holds sums of so few 16-bit values, and its roundings are far below theirs.
    const V base = sorted[lo];
    V sum[4] = {};
    int64_t r = lo + 1;
    for (; r + 4 <= hi; r += 4)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += sorted[r + k] - base;
    for (; r < hi; ++r) sum[0] += sorted[r] - base;
    const V mean = base + ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<C>(hi - lo);
    if (__builtin_expect(!any_nan(mean * static_cast<C>(0)), true)) {
      store(out, mean);
      return;
    }
  }
  const C* cells = reinterpret_cast<const C*>(sorted);
  const Divisor count(static_cast<double>(hi - lo));
  for (int part = 0; part < lanes; part += kDoubles) {
    const auto value = [&](int64_t r) { return load_double(cells + r * lanes + part); };
    const F64 base = sizeof(C) == 4 ? F64{} : value(lo);
    F64 sum[4] = {};
    int64_t r = sizeof(C) == 4 ? lo : lo + 1;
    for (; r + 4 <= hi; r += 4)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += value(r + k) - base;
    for (; r < hi; ++r) sum[0] += value(r) - base;
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    F64 mean = sizeof(C) == 4 ? divided(sum[0], count) : moved(base, sum[0], count);
    if (__builtin_expect(any_nan(mean * 0.0), false)) {
      DoubledSum shrunken{};
      for (r = lo; r < hi; ++r) add(shrunken, value(r) * kRoom);
      mean = mean - mean == 0 ? mean : shrunken_mean(shrunken, static_cast<double>(hi - lo));
    }
    store_rounded(out + part, narrow ? to_odd(mean) : mean);
  }
}

// The scale of a doubled middle that is no number otherwise: a power of two.
template <class C>
RK_INLINE typename Simd<C>::V scale_of(typename Simd<C>::V doubled) {
  using V = typename Simd<C>::V;
  return doubled - doubled == 0 ? V{} + static_cast<C>(1) : V{} + static_cast<C>(0.5);
}

// The mean of sorted[lo..hi) per lane, its double times a scale (scale_of), and what the roundings of that lost; 0
// where it is no number.
template <class C>
void store_doubled_mean(const typename Simd<C>::V* sorted, int64_t lo, int64_t hi, C* rounded, C* total, double* rest) {
  using V = typename Simd<C>::V;
  constexpr int lanes = Simd<C>::lanes;
  const C* cells = reinterpret_cast<const C*>(sorted);
  const Divisor count(static_cast<double>(hi - lo));
  F64 means[lanes / kDoubles], lost[lanes / kDoubles];
  for (int part = 0; part < lanes; part += kDoubles) {
    const auto value = [&](int64_t r) { return load_double(cells + r * lanes + part); };
    const F64 base = value(lo);
    F64 sum[4] = {};
    int64_t r = lo + 1;
    for (; r + 4 <= hi; r += 4)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += value(r + k) - base;
    for (; r < hi; ++r) sum[0] += value(r) - base;
    F64& mean = means[part / kDoubles];
    mean = moved(base, (sum[0] + sum[1]) + (sum[2] + sum[3]), count, lost[part / kDoubles]);
    if (__builtin_expect(any_nan(mean * 0.0), false)) {
      DoubledSum shrunken{};
      for (r = lo; r < hi; ++r) add(shrunken, value(r) * kRoom);
      mean = mean - mean == 0 ? mean : shrunken_mean(shrunken, static_cast<double>(hi - lo));
    }
    store_rounded(rounded + part, mean);
  }
  const V once = load(rounded);
  C scale[lanes];
  store(scale, scale_of<C>(once + once));
  for (int part = 0; part < lanes; part += kDoubles) {
    const F64 twice = load_double(scale + part) * 2.0, doubled = means[part / kDoubles] * twice;
    store_rounded(total + part, doubled);
    const F64 left = (doubled - load_double(total + part)) + lost[part / kDoubles] * twice;
    store(rest + part, left - left == 0 ? left : F64{});
  }
}

// Twice a middle, times a scale, so that it does not overflow; and what its rounding lost, of a mean as float64,
// because float32 may not hold it.
template <class C>
struct Twice {
  using V = typename Simd<C>::V;
  V total, lost{}, scale;
  const double* rest = nullptr;  // of a mean

  Twice(V a, V b) : scale(scale_of<C>(a + b)) { two_sum(a * scale, b * scale, total, lost); }
  Twice(V mean, const C* doubled, const double* lost_of_it)
      : total(load(doubled)), scale(scale_of<C>(mean + mean)), rest(lost_of_it) {}

  // Whether low + high is less, which is rounded to the same number, by what the roundings lose.
  __attribute__((noinline)) typename Simd<C>::Index more_than(V low, V high) const {
    V sum, sum_lost;
    two_sum(low * scale, high * scale, sum, sum_lost);
    typename Simd<C>::Index less = (sum < total) | ((sum == total) & (sum_lost < lost));
    for (int lane = 0; rest && lane < Simd<C>::lanes; ++lane)
      if (sum[lane] == total[lane]) less[lane] = static_cast<double>(sum_lost[lane]) < rest[lane] ? -1 : 0;
    return less;
  }
};

// Mean of the window.nearest values nearest to the middle of the window's ends, or to the mean of more than two cells,
// written to out; sorted[0, n) is overwritten.
// Ranks that lie `nearest` apart compete: of each pair the nearer one goes on to the place of the upper, so that the
// last `nearest` places end up with the values taken. Where a lower rank stays, all above it that compete with it do.
template <class C>
__attribute__((noinline)) void store_nearest_mean(const Window& window, typename Simd<C>::V* sorted, C* out) {
  using V = typename Simd<C>::V;
  using Index = typename Simd<C>::Index;
  const int64_t n = window.n, nearest = window.nearest;
  V a = sorted[window.lo], b = sorted[window.hi - 1];
  Twice<C> twice(a, b);
  C total[Simd<C>::lanes];
  double rest[Simd<C>::lanes];
  if (window.hi - window.lo > 2) {
    store_doubled_mean<C>(sorted, window.lo, window.hi, out, total, rest);
    a = b = load(out);
    twice = Twice<C>(a, total, rest);
  }
  const V middle = a + b - (a + b) == 0 ? twice.total : a + b;
  for (int64_t k = 0; k + nearest < n; ++k) {
    const V lower = sorted[k], upper = sorted[k + nearest], sum = lower + upper;
    Index nearer = sum < middle;
    const Index tied = sum == middle;
    if (__builtin_expect(any_set(tied), false)) nearer |= tied & twice.more_than(lower, upper);
    sorted[k + nearest] = nearer ? upper : lower;
  }
  store_window_mean<C>(sorted, n - nearest, n, window.narrow, out);
  const V unusual = (a - a) + (b - b);  // an infinite middle is itself the result
  if (__builtin_expect(any_nan(unusual), false)) store(out, unusual == 0 ? load(out) : middle);
}

// How the values of a storage type are sorted: V is a vector of them, with NaN as +inf (they sort alike). A check
// gathers whether some were no numbers.
template <class S>
struct Sorted {
  using V = typename Simd<S>::V;
  using Count = typename Simd<S>::Index;

  static RK_INLINE V read(const S* p, V& check) {
    const V x = load(p);
    check = fmadd(x, V{}, check);
    return x;
  }
  static RK_INLINE bool special(V check, V other) { return any_nan(check + other); }
  static RK_INLINE V top() { return V{} + infinity<S>(); }

  // Reads all rows again, notes those that hold a NaN or Inf and counts the NaN per column.
  static __attribute__((noinline)) Count patch(const S* const* src, int64_t n, int64_t at, V* patched,
                                               uint8_t* nonfinite) {
    Count nan_cells = {};
    for (int64_t i = 0; i < n; ++i) {
      const V x = load(src[i] + at);
      const Count is_nan = x != x;
      nonfinite[i] |= any_nan(x * 0);
      patched[i] = is_nan ? top() : x;
      nan_cells -= is_nan;
    }
    return nan_cells;
  }
  static RK_INLINE void store_mean(const V* sorted, int64_t lo, int64_t hi, bool narrow, S* out) {
    store_window_mean<S>(sorted, lo, hi, narrow, out);
  }
};

// The bits of a 16-bit number with those below the sign turned round where it is set are an integer in the same order.
template <class S>
struct SortedShort {
  using V = I16;
  using Count = I16;

  static RK_INLINE I16 bits(const S* p) { return *reinterpret_cast<const UnalignedI16*>(p); }
  static RK_INLINE I16 fold(I16 x) { return x ^ ((x >> 15) & 0x7fff); }
  static RK_INLINE V read(const S* p, V& check) {
    const I16 x = bits(p);
    check = vmax(check, x & 0x7fff);
    return fold(x);
  }
  static RK_INLINE bool special(V check, V other) { return any_set(vmax(check, other) >= Storage<S>::infinity); }
  static RK_INLINE V top() { return V{} + Storage<S>::infinity; }
  static __attribute__((noinline)) Count patch(const S* const* src, int64_t n, int64_t at, V* patched,
                                               uint8_t* nonfinite) {
    Count nan_cells = {};
    for (int64_t i = 0; i < n; ++i) {
      const I16 x = bits(src[i] + at), magnitude = x & 0x7fff, is_nan = magnitude > Storage<S>::infinity;
      nonfinite[i] |= any_set(magnitude >= Storage<S>::infinity);
      patched[i] = is_nan ? top() : fold(x);
      nan_cells -= is_nan;
    }
    return nan_cells;
  }
  static RK_INLINE void store_mean(const V* sorted, int64_t lo, int64_t hi, bool, float* out) {
    constexpr int lanes = Simd<float>::lanes;
    F32 wide[2][kUnrolledRows];
    for (int64_t r = lo; r < hi; ++r) {
      S cells[2 * lanes];
      const I16 x = fold(sorted[r]);
      memcpy(cells, &x, sizeof(x));
      wide[0][r - lo] = load_single(cells);
      wide[1][r - lo] = load_single(cells + lanes);
    }
    store_window_mean<float>(wide[0], 0, hi - lo, true, out);
    store_window_mean<float>(wide[1], 0, hi - lo, true, out + lanes);
  }
};
template <>
struct Sorted<Half> : SortedShort<Half> {};
template <>
struct Sorted<Bfloat> : SortedShort<Bfloat> {};

// A window that reaches a NaN gives NaN, and so do nearest values of which one is a NaN.
template <class Count, class C>
RK_INLINE void spoil_nan(const Window& window, Count nan_cells, C* out) {
  for (int lane = 0; lane < static_cast<int>(sizeof(Count) / sizeof(nan_cells[0])); ++lane)
    if (nan_cells[lane] > window.n - max64(window.hi, window.nearest)) out[lane] = static_cast<C>(__builtin_nan(""));
}

// ---- unrolled networks ---------------------------------------------------------------------------------

// N wires; kMedian: pruned to the middle ranks of exactly N rows, else a full sort of at most N rows.
template <class S, int N, bool kMedian>
struct Unrolled {
  using C = ComputeOf<S>;
  using V = typename Sorted<S>::V;
  static constexpr int lanes = kStored<S>;
  static constexpr FixedNetwork<N> value{kMedian ? (N - 1) / 2 : 0, kMedian ? N / 2 + 1 : N};

  static RK_INLINE void sort_and_store(V (&x)[N], const Window& window, C* out, Ahead& ahead) {
    apply<Unrolled, (N > kFollowedRows)>(x, ahead, typename MakeIndices<value.count>::type{});
    if constexpr (kMedian) {
      // Only the middle is in order; an even N offers its low, its high or their mean.
      constexpr int low = (N - 1) / 2, high = N / 2;
      const V middle[2] = {window.lo == low ? x[low] : x[high], x[high]};
      if (window.hi - window.lo == 2)
        Sorted<S>::store_mean(middle, 0, 2, window.narrow, out);
      else
        Sorted<S>::store_mean(middle, 0, 1, window.narrow, out);
    } else {
      V sorted[N];
#pragma GCC unroll 32  // as a loop it would be compiled to a slow block copy
      for (int i = 0; i < N; ++i) sorted[i] = x[i];
      if constexpr (sizeof(S) > 2)
        if (window.nearest) {
          store_nearest_mean<C>(window, sorted, out);
          return;
        }
      Sorted<S>::store_mean(sorted, window.lo, window.hi, window.narrow, out);
    }
  }

  static void run(const Window& window, const S* const* src, int64_t columns, C*, C* out, uint8_t* nonfinite,
                  Ahead& ahead) {
    const int rows = kMedian ? N : static_cast<int>(window.n);
    for (int64_t at = 0; at < columns; at += lanes) {
      V x[N];
      V check[2] = {};
#pragma GCC unroll 32  // as a loop it would go through memory
      for (int i = 0; i < N; ++i) {
        if (kMedian || i < N - 3 || i < rows) {
          x[i] = Sorted<S>::read(src[i] + at, check[i % 2]);
          if (N <= kFollowedRows) __builtin_prefetch(src[i] + at + kPrefetchVectors * lanes);
        } else {
          x[i] = Sorted<S>::top();
        }
      }
      if (__builtin_expect(Sorted<S>::special(check[0], check[1]), false))
        run_patched(window, src, at, out + at, nonfinite, ahead);
      else
        sort_and_store(x, window, out + at, ahead);
      if (N > kFollowedRows) ahead.step();
    }
  }

  static __attribute__((noinline)) void run_patched(const Window& window, const S* const* src, int64_t at, C* out,
                                                    uint8_t* nonfinite, Ahead& ahead) {
    V x[N];
    const auto nan_cells = Sorted<S>::patch(src, window.n, at, x, nonfinite);
    for (int i = static_cast<int>(window.n); i < N; ++i) x[i] = Sorted<S>::top();
    sort_and_store(x, window, out, ahead);
    spoil_nan(window, nan_cells, out);
  }
};

template <class S, class C = ComputeOf<S>>
using Selector = void (*)(const Window&, const S* const*, int64_t, C*, C*, uint8_t*, Ahead&);

template <class S, int... I>
Selector<S> unrolled_median(int64_t n, Indices<I...>) {
  static constexpr Selector<S> table[] = {&Unrolled<S, I + 1, true>::run...};
  return table[n - 1];
}
template <class S, int... I>
Selector<S> unrolled_sort(int64_t n, Indices<I...>) {
  static constexpr Selector<S> table[] = {&Unrolled<S, 4 * (I + 1), false>::run...};
  return table[(n - 1) / 4];
}

bool is_median(const Window& w) { return !w.nearest && w.lo >= (w.n - 1) / 2 && w.hi <= w.n / 2 + 1; }
bool is_unrolled(const Window& w) { return w.n <= kUnrolledRows && !w.multiplicities; }

// ---- more rows than registers ----------------------------------------------------------------------------

// A lane of the window mean where sums overflow or meet an infinity.
template <class C>
double careful_window_mean(const C* x, int64_t n, int64_t cells, C from, C below, int64_t copies_low, double low,
                           int64_t copies_high, double high) {
  constexpr int lanes = Simd<C>::lanes;
  DoubledSum sum{};
  const auto add_value = [&](double value) { add(sum, splat<F64>(value * kRoom)); };
  for (int64_t i = 0; i < n; ++i)
    if (x[i * lanes] >= from && !(x[i * lanes] >= below)) add_value(static_cast<double>(x[i * lanes]));
  for (int64_t i = 0; i < copies_low; ++i) add_value(low);
  for (int64_t i = 0; i < copies_high; ++i) add_value(high);
  return shrunken_mean(sum, static_cast<double>(cells))[0];
}

// Sorts n values in two parts, filled up with `top`.
template <class V>
RK_INLINE void sort_parts(V* x, int64_t n, const Parts& parts, V top, Ahead& ahead) {
  for (int64_t i = n; i < parts.size(); ++i) x[i] = top;
  sort_part(x, parts.first, ahead);
  sort_part(x + parts.first, parts.second, ahead);
}

// The first and the last value of the window.
template <class V>
RK_INLINE void find_ends(const Window& window, const V* x, const Parts& parts, V (&ends)[2]) {
  const int64_t rest = window.n - parts.first;
  ends[0] = value_of_rank(x, parts.first, x + parts.first, rest, window.lo);
  ends[1] = value_of_rank(x, parts.first, x + parts.first, rest, window.hi - 1);
}

// Consecutive ranks of a column: the values in [from, below), `copies_high` copies of `high`, and for the rest copies
// of `low`.
template <class C>
struct Run {
  typename Simd<C>::V low, high, from, below;
  typename Simd<C>::Index copies_high;
};

// The run of the `nearest` values nearest to the middle of a and b, neighbours in rank; distances are put in the n
// vectors after x.
template <class C>
Run<C> nearest_run(typename Simd<C>::V* x, int64_t n, int64_t nearest, typename Simd<C>::V a, typename Simd<C>::V b,
                   Guess<C>& guess) {
  using V = typename Simd<C>::V;
  using Index = typename Simd<C>::Index;
  using I = typename Simd<C>::IndexScalar;
  const V none = V{} + infinity<C>();
  Run<C> run{};
  if (nearest == n) {
    run.from = -none;
    run.below = V{} + static_cast<C>(__builtin_nan(""));
    run.low = run.high = smallest_from<C>(x, n, run.from);
    return run;
  }
  // Differences of large numbers may overflow, which those of their halves do not.
  const V far = vmax(vmax(a, -a), vmax(b, -b));
  const V half = far > static_cast<C>(0x1p100) ? V{} + static_cast<C>(0.5) : V{} + static_cast<C>(1);
  // Distances from the middle are those from b below it, and from a above, less half of what lies between.
  const auto ends_of = [&](V value, V& greater, V& less) {
    const Index lower = value <= a;
    greater = (lower ? b : value) * half;
    less = (lower ? value : a) * half;
  };
  V* away = x + n;
  for (int64_t i = 0; i < n; ++i) {
    V greater, less;
    ends_of(x[i], greater, less);
    away[i] = greater - less;
  }
  Cut<C> cut = find_cut<C>(away, n, nearest, nearest, guess);
  if (any_set(cut.tied)) {  // distances that are rounded to the same number are told apart by what that loses
    for (int64_t i = 0; i < n; ++i) {
      V greater, less, rounded, lost;
      ends_of(x[i], greater, less);
      two_sum(greater, -less, rounded, lost);
      lost = lost == lost ? lost : V{};  // infinite
      away[i] = away[i] < cut.at ? -none : cut.tied & (away[i] == cut.at) ? lost : none;
    }
    Guess<C> fresh{V{}, V{} + static_cast<C>(1e-30), {}};
    cut = find_cut<C>(away, n, nearest, nearest, fresh);
  }
  V first = none, last = -none, low = -none, high = none;
  Index tied_low = {};
  for (int64_t i = 0; i < n; ++i) {
    const Index inside = away[i] < cut.at, tied = away[i] == cut.at, lower = x[i] <= a;
    first = inside ? vmin(first, x[i]) : first;
    last = inside ? vmax(last, x[i]) : last;
    low = tied & lower ? vmax(low, x[i]) : low;
    high = tied & ~lower ? vmin(high, x[i]) : high;
    tied_low -= tied & lower;
  }
  // Of equally far values the lower ones come first.
  const Index missing = cut.tied & (static_cast<I>(nearest) - cut.below);
  const Index copies_low = missing < tied_low ? missing : tied_low, any_inside = cut.below > 0;
  run.copies_high = missing - copies_low;
  run.from = first;
  run.below = any_inside ? next_above<C>(last) : -none;
  run.low = copies_low > 0 ? low : any_inside ? first : high;
  run.high = high;
  return run;
}

// Mean of the cells of a run of n values, of which `copies_high` are copies of its last one, written to out.
template <class C>
void store_run_mean(const typename Simd<C>::V* x, int64_t n, const Run<C>& run, int64_t cells, bool narrow, C* out) {
  using V = typename Simd<C>::V;
  using Index = typename Simd<C>::Index;
  constexpr int lanes = Simd<C>::lanes, parts = lanes / kDoubles;
  constexpr bool kCentred = sizeof(C) == 8;  // as in store_window_mean
  C lows[lanes], highs[lanes], copies[lanes], values[lanes];
  store(lows, run.low);
  store(highs, run.high);
  store(copies, __builtin_convertvector(run.copies_high, V));
  F64 sum[parts] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Index outside = (x[i] < run.from) | (x[i] >= run.below);
    store(values, outside ? run.low : x[i]);
    for (int part = 0; part < parts; ++part) {
      const F64 value = load_double(values + part * kDoubles);
      sum[part] += kCentred ? value - load_double(lows + part * kDoubles) : value;
    }
  }
  const Divisor count(static_cast<double>(cells));
  for (int part = 0; part < parts; ++part) {
    const F64 first = load_double(lows + part * kDoubles), last = load_double(highs + part * kDoubles);
    const F64 copied = load_double(copies + part * kDoubles);
    F64 total = sum[part] + (copied > 0 ? copied * (last - first) : F64{});
    F64 mean = kCentred ? moved(first, total, count) : divided(total + first * static_cast<double>(cells - n), count);
    if (__builtin_expect(any_nan(mean * 0.0), false))
      for (int at = 0; at < kDoubles; ++at) {
        if (mean[at] - mean[at] == 0) continue;
        const int lane = part * kDoubles + at;
        const C* column = reinterpret_cast<const C*>(x) + lane;
        int64_t inside = 0;
        for (int64_t i = 0; i < n; ++i)
          inside += column[i * lanes] >= run.from[lane] && !(column[i * lanes] >= run.below[lane]);
        const int64_t copied_high = run.copies_high[lane];
        mean[at] = careful_window_mean<C>(column, n, cells, run.from[lane], run.below[lane],
                                          cells - inside - copied_high, first[at], copied_high, last[at]);
      }
    store_rounded(out + part * kDoubles, narrow ? to_odd(mean) : mean);
  }
}

// The window's cells in two sorted parts of n values; of one or two only the ends.
template <class C>
Run<C> sorted_run(const Window& window, typename Simd<C>::V* x, const Parts& parts) {
  using I = typename Simd<C>::IndexScalar;
  typename Simd<C>::V ends[2];
  find_ends(window, x, parts, ends);
  Run<C> run{};
  run.low = ends[0];
  run.high = ends[1];
  if (window.hi - window.lo <= 2) return run;
  run.from = next_above<C>(run.low);
  run.below = run.high;
  run.copies_high = static_cast<I>(window.hi) - count_below<C>(x, window.n, run.high);
  return run;
}

// One or two cells [lo, hi) in the middle of n values: only the ends.
template <class C>
Run<C> counted_ends(const Window& window, const typename Simd<C>::V* x, Guess<C>& guess) {
  using V = typename Simd<C>::V;
  using I = typename Simd<C>::IndexScalar;
  const int64_t n = window.n, cells = window.hi - window.lo;
  // One cell has a cut on either side; two have one between them.
  const int64_t least = cells == 2 ? window.lo + 1 : max64(window.lo, 1);
  const int64_t most = cells == 2 ? least : min64(window.hi, n - 1);
  const Cut<C> cut = find_cut<C>(x, n, least, most, guess);
  const V below = largest_below<C>(x, n, cut.at), from = smallest_from<C>(x, n, cut.at);
  Run<C> run{};
  run.low = (cut.tied ? cut.at : below) + static_cast<C>(0);
  run.high = (cut.tied ? cut.at : from) + static_cast<C>(0);
  if (cells == 1) run.low = run.high = cut.below == static_cast<I>(window.hi) ? run.low : run.high;
  return run;
}

// More cells [lo, hi) of n values: what lies between two cuts.
template <class C>
Run<C> counted_run(const Window& window, const typename Simd<C>::V* x, Guess<C>* guess) {
  using V = typename Simd<C>::V;
  using Index = typename Simd<C>::Index;
  using I = typename Simd<C>::IndexScalar;
  Run<C> run{};
  Index low_tied = {};
  run.from = V{} - infinity<C>();
  run.below = V{} + static_cast<C>(__builtin_nan(""));
  if (window.lo > 0) {
    const Cut<C> cut = find_cut<C>(x, window.n, window.lo, window.lo, guess[0]);
    low_tied = cut.tied;
    run.low = cut.at;
    run.from = cut.tied ? next_above<C>(cut.at) : cut.at;
  }
  run.low = low_tied ? run.low : smallest_from<C>(x, window.n, run.from);
  if (window.hi < window.n) {
    const Cut<C> cut = find_cut<C>(x, window.n, window.hi, window.hi, guess[1]);
    run.below = run.high = cut.at;
    run.copies_high = cut.tied & (static_cast<I>(window.hi) - cut.below);
  }
  return run;
}

template <class C>
void sort_values(const Window& window, typename Simd<C>::V* x) {
  const Comparator* net = static_cast<const Comparator*>(window.network);
  for (int64_t c = 0; c < window.comparators; ++c) {
    const typename Simd<C>::V low = x[net[c].low], high = x[net[c].high];
    x[net[c].low] = vmin(low, high);
    x[net[c].high] = vmax(low, high);
  }
}

// Mean of the cells [lo, hi) of n values, or of those nearest to it, which may be reordered; no value is a NaN.
template <class C>
void store_mean_of_many(const Window& window, typename Simd<C>::V* x, Guess<C>* guess, C* out, Ahead& ahead) {
  using V = typename Simd<C>::V;
  const int64_t n = window.n, cells = window.hi - window.lo;
  Run<C> run;
  if (n <= kSortedRows) {
    const Parts parts(n);
    sort_parts(x, n, parts, V{} + infinity<C>(), ahead);
    if (window.nearest) {
      join_parts(x, parts, V{} + infinity<C>(), ahead);
      store_nearest_mean<C>(window, x, out);
      return;
    }
    run = sorted_run<C>(window, x, parts);
  } else if (window.network) {
    sort_values<C>(window, x);
    store_nearest_mean<C>(window, x, out);
    return;
  } else {
    run = cells <= 2 ? counted_ends<C>(window, x, guess[0]) : counted_run<C>(window, x, guess);
  }
  if (cells > 2) {
    store_run_mean<C>(x, n, run, cells, window.narrow, out);
    return;
  }
  const V ends[2] = {run.low, run.high};
  store_window_mean<C>(ends, 0, cells, window.narrow, out);
  if (!window.nearest) return;
  const V centre = load(out);
  const auto usual = centre - centre == 0;
  run = nearest_run<C>(x, n, window.nearest, usual ? run.low : V{}, usual ? run.high : V{}, guess[1]);
  store_run_mean<C>(x, n, run, window.nearest, window.narrow, out);
  store(out, usual ? load(out) : centre);
}

template <class S>
void run_many(const Window& window, const S* const* src, int64_t columns, ComputeOf<S>* scratch, ComputeOf<S>* out,
              uint8_t* nonfinite, Ahead& ahead) {
  using C = ComputeOf<S>;
  using V = typename Sorted<S>::V;
  Guess<C>* guess = reinterpret_cast<Guess<C>*>(scratch);
  V* x = reinterpret_cast<V*>(guess + 2);
  const auto select = [&](C* result) {
    if constexpr (sizeof(S) == 2) {
      const Parts parts(window.n);
      V ends[2];
      sort_parts(x, window.n, parts, Sorted<S>::top(), ahead);
      find_ends(window, x, parts, ends);
      if (window.hi - window.lo == 2)
        Sorted<S>::store_mean(ends, 0, 2, window.narrow, result);
      else
        Sorted<S>::store_mean(ends, 0, 1, window.narrow, result);
    } else {
      store_mean_of_many<C>(window, x, guess, result, ahead);
    }
  };
  for (int64_t at = 0; at < columns; at += kStored<S>) {
    V check[4] = {};  // apart, because each waits for the one before
    int64_t i = 0;
    for (; i + 4 <= window.n; i += 4)
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) x[i + k] = Sorted<S>::read(src[i + k] + at, check[k]);
    for (; i < window.n; ++i) x[i] = Sorted<S>::read(src[i] + at, check[0]);
    if (__builtin_expect(Sorted<S>::special(check[0], check[1]) || Sorted<S>::special(check[2], check[3]), false)) {
      const auto nan_cells = Sorted<S>::patch(src, window.n, at, x, nonfinite);
      select(out + at);
      spoil_nan(window, nan_cells, out + at);
    } else {
      select(out + at);
    }
    ahead.step();
  }
}

// ---- with multiplicities -------------------------------------------------------------------------------

// At most two cells of at most N rows: values are sorted together with their multiplicities in units of the greatest
// common divisor, and the values in which the first and the last cell fall are picked in one walk over the sums.
template <class C, int N>
struct UnrolledWeighted {
  using V = typename Simd<C>::V;
  using Index = typename Simd<C>::Index;
  using I = typename Simd<C>::IndexScalar;
  static constexpr int lanes = Simd<C>::lanes;
  static constexpr FixedNetwork<N> value{0, N};

  template <int... K>
  static RK_INLINE void sort(V (&x)[N], Index (&cells)[N], Indices<K...>) {
    (
        [&] {
          constexpr int low = value.net[K].low, high = value.net[K].high;
          const Index swap = x[high] < x[low], a = cells[low], b = cells[high];
          exchange(x[low], x[high]);
          cells[low] = swap ? b : a;
          cells[high] = swap ? a : b;
        }(),
        ...);
  }

  static void run(const Window& window, const C* const* src, int64_t columns, C*, C* out, uint8_t* nonfinite,
                  Ahead& ahead) {
    const Index first = Index{} + static_cast<I>(window.first_cell), last = Index{} + static_cast<I>(window.last_cell);
    for (int64_t at = 0; at < columns; at += lanes) {
      V x[N];
      Index cells[N];
      V check[2] = {};
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) {
        const bool real = i < N - 3 || i < window.n;
        x[i] = real ? load(src[i] + at) : V{} + infinity<C>();
        cells[i] = Index{} + static_cast<I>(real ? window.reduced[i] : 0);
        if (real) check[i % 2] = fmadd(x[i], V{}, check[i % 2]);
      }
      ahead.step();
      const bool careful = any_nan(check[0] + check[1]);
      Index nan_cells = {};
      if (__builtin_expect(careful, false)) {
        Sorted<C>::patch(src, window.n, at, x, nonfinite);
        for (int64_t i = 0; i < window.n; ++i) {
          const V value = load(src[i] + at);
          nan_cells += (value != value) & static_cast<I>(window.reduced[i]);
        }
      }
      sort(x, cells, typename MakeIndices<value.count>::type{});
      V ends[2] = {x[0], x[0]};
      Index before = cells[0];
#pragma GCC unroll 32
      for (int r = 1; r < N; ++r) {
        ends[0] = before <= first ? x[r] : ends[0];
        ends[1] = before <= last ? x[r] : ends[1];
        before += cells[r];
      }
      store_window_mean<C>(ends, 0, 2, window.narrow, out + at);
      if (__builtin_expect(careful, false)) {
        const Index reached = last >= static_cast<I>(window.reduced_total) - nan_cells;
        store(out + at, reached ? V{} + static_cast<C>(__builtin_nan("")) : load(out + at));
      }
    }
  }
};

template <class C, int... K>
Selector<C> unrolled_weighted(int64_t n, Indices<K...>) {
  static constexpr Selector<C> table[] = {&UnrolledWeighted<C, 4 * (K + 1)>::run...};
  return table[(n - 1) / 4];
}

// One column's sorted values and their rows, a lane apart: the mean over the cells [lo, hi).
template <class C, class I>
C weighted_window_mean(const Window& window, const C* sorted, const I* row) {
  constexpr int lanes = Simd<C>::lanes;
  const double cells = static_cast<double>(window.hi - window.lo);
  int64_t before = 0, first_count = 0, last_count = 0;
  int contributions = 0;
  double base = 0, sum = 0, plain = 0, last = 0;
  for (int64_t r = 0; r < window.n && before < window.hi; ++r) {
    const int64_t after = before + window.multiplicities[row[r * lanes]];
    const int64_t from = max64(before, window.lo), to = min64(after, window.hi);
    before = after;
    if (to <= from) continue;
    const double count = static_cast<double>(to - from), x = static_cast<double>(sorted[r * lanes]);
    if (contributions++ == 0) {
      base = x;
      first_count = to - from;
    }
    sum += count * (x - base);
    plain += count / cells * x;
    last = x;
    last_count = to - from;
  }
  if (contributions == 1) return static_cast<C>(base);
  // Two equal halves are the unweighted median's middle: the same rounding as there.
  if (contributions == 2 && first_count == last_count) {
    const C both = static_cast<C>(base) + static_cast<C>(last);
    if (both - both == 0) return both * static_cast<C>(0.5);
    return static_cast<C>(base) * static_cast<C>(0.5) + static_cast<C>(last) * static_cast<C>(0.5);
  }
  F64 mean = moved(splat<F64>(base), splat<F64>(sum), Divisor(cells));
  if (mean[0] - mean[0] != 0) mean = splat<F64>(plain);
  return static_cast<C>(window.narrow ? to_odd(mean)[0] : mean[0]);
}

// Values and the rows they come from are sorted together.
template <class C>
void run_weighted(const Window& window, const C* const* src, int64_t columns, C* scratch, C* out, uint8_t* nonfinite,
                  Ahead&) {
  using V = typename Simd<C>::V;
  using Index = typename Simd<C>::Index;
  constexpr int lanes = Simd<C>::lanes;
  V* x = reinterpret_cast<V*>(scratch);
  Index* row = reinterpret_cast<Index*>(scratch + window.n * lanes);
  using I = typename Simd<C>::IndexScalar;
  const Comparator* net = static_cast<const Comparator*>(window.network);
  for (int64_t at = 0; at < columns; at += lanes) {
    V check = {};
    for (int64_t i = 0; i < window.n; ++i) {
      x[i] = load(src[i] + at);
      check = fmadd(x[i], V{}, check);
      row[i] = Index{} + static_cast<I>(i);
      __builtin_prefetch(src[i] + at + kPrefetchVectors * lanes);
    }
    const bool careful = any_nan(check);
    if (__builtin_expect(careful, false)) Sorted<C>::patch(src, window.n, at, x, nonfinite);
    for (int64_t c = 0; c < window.comparators; ++c) {
      const int64_t low = net[c].low, high = net[c].high;
      const V a = x[low], b = x[high];
      const Index p = row[low], q = row[high];
      const auto swap = b < a;
      x[low] = swap ? b : a;
      x[high] = swap ? a : b;
      row[low] = swap ? q : p;
      row[high] = swap ? p : q;
    }
    for (int lane = 0; lane < lanes; ++lane)
      out[at + lane] = weighted_window_mean<C>(window, scratch + lane, reinterpret_cast<const I*>(row) + lane);
    if (__builtin_expect(careful, false))
      for (int lane = 0; lane < lanes; ++lane) {
        int64_t nan_cells = 0;
        for (int64_t i = 0; i < window.n; ++i) {
          const C value = load_scalar(src[i] + at + lane);
          if (value != value) nan_cells += window.multiplicities[i];
        }
        if (nan_cells > window.total - window.hi) out[at + lane] = static_cast<C>(__builtin_nan(""));
      }
  }
}

// The rows of a few columns at a time, widened: for what is only written for float32.
constexpr int64_t kWidened = 64;

template <class S>
void run_widened(const Window& window, const S* const* src, int64_t columns, float* scratch, float* out,
                 uint8_t* nonfinite, Ahead& ahead) {
  float* wide = scratch + select_scratch<float>(window);
  const float** rows = reinterpret_cast<const float**>(wide + window.n * kWidened);
  for (int64_t at = 0; at < columns; at += kWidened) {
    const int64_t count = min64(kWidened, columns - at);
    for (int64_t i = 0; i < window.n; ++i) {
      rows[i] = wide + i * kWidened;
      widen_run(src[i] + at, count, wide + i * kWidened);
    }
    select_tile<float>(window, rows, count, scratch, out + at, nonfinite, ahead);
  }
}

// The unrolled networks, and two parts where only the ends of the window count.
bool sorts_shorts(const Window& w) {
  return !w.nearest && (is_unrolled(w) || (w.n <= kSortedRows && w.hi - w.lo <= 2 && !w.multiplicities));
}

template <class S>
Selector<S> selector_for(const Window& window) {
  constexpr int64_t most = sizeof(S) == 4 ? INT32_MAX : INT64_MAX;
  if constexpr (sizeof(S) == 2) {
    if (!sorts_shorts(window)) return &run_widened<S>;
  } else {
    if (window.reduced && window.n <= kUnrolledRows && window.reduced_total <= most)
      return unrolled_weighted<S>(window.n, MakeIndices<kUnrolledRows / 4>::type{});
    if (window.multiplicities) return &run_weighted<S>;
  }
  if (!is_unrolled(window)) return &run_many<S>;
  return is_median(window) ? unrolled_median<S>(window.n, typename MakeIndices<kUnrolledRows>::type{})
                           : unrolled_sort<S>(window.n, typename MakeIndices<kUnrolledRows / 4>::type{});
}

}  // namespace

// The sum of the multiplicities, and them in units of their greatest common divisor; false: out of memory.
static bool prepare_cells(Window& window) {
  window.total = 0;
  int64_t divisor = 0;
  for (int64_t i = 0; i < window.n; ++i) {
    window.total += window.multiplicities[i];
    for (int64_t rest = window.multiplicities[i]; rest != 0;) {
      const int64_t next = divisor % rest;
      divisor = rest;
      rest = next;
    }
  }
  if (window.hi - window.lo > 2) return true;
  window.reduced = static_cast<int64_t*>(malloc(sizeof(int64_t) * static_cast<size_t>(window.n)));
  if (!window.reduced) return false;
  for (int64_t i = 0; i < window.n; ++i) window.reduced[i] = window.multiplicities[i] / divisor;
  window.reduced_total = window.total / divisor;
  window.first_cell = window.lo / divisor;
  window.last_cell = (window.hi - 1) / divisor;
  return true;
}

bool prepare_window(Window& window) {
  window.total = window.n;
  // Many rows are cut at a value; what is near to the mean of a window is found among sorted ones.
  const bool sorts = window.nearest && window.hi - window.lo > 2 && window.n > kSortedRows;
  if (!window.multiplicities && !sorts) return true;
  if (window.multiplicities && !prepare_cells(window)) return false;
  const int n = static_cast<int>(window.n);
  int count = 0;
  sorting_network(n, [&](int, int) { ++count; });
  Comparator* net = static_cast<Comparator*>(malloc(sizeof(Comparator) * static_cast<size_t>(count + 1)));
  if (!net) {
    free(window.reduced);
    return false;
  }
  // Which rank a window of cells reaches depends on the column: nothing to prune.
  sorting_network(n, [&](int low, int high) {
    net[window.comparators++] = {static_cast<unsigned short>(low), static_cast<unsigned short>(high)};
  });
  window.network = net;
  return true;
}

void release_window(Window& window) {
  free(window.network);
  free(window.reduced);
}

template <class S>
int64_t select_scratch(const Window& window) {
  // Values and their rows; or two guesses and the values, filled up, or their distances after them. Then
  // what is widened, and pointers to it.
  const int64_t filled = window.n <= kSortedRows ? Parts(window.n).size() : window.n;
  const int64_t sorting = max64(2 * window.n + (window.nearest ? 6 : 0), filled + 6) * Simd<ComputeOf<S>>::lanes;
  return sorting + (sizeof(S) == 2 && !sorts_shorts(window) ? window.n * (kWidened + 2) : 0);
}

template <class S>
void select_tile(const Window& window, const S* const* src, int64_t columns, ComputeOf<S>* scratch, ComputeOf<S>* out,
                 uint8_t* nonfinite, Ahead& ahead) {
  selector_for<S>(window)(window, src, columns, scratch, out, nonfinite, ahead);
}

#define RK_SELECT(S)                                 \
  template int64_t select_scratch<S>(const Window&); \
  template void select_tile<S>(const Window&, const S* const*, int64_t, ComputeOf<S>*, ComputeOf<S>*, uint8_t*, Ahead&);
RK_SELECT(Half)
RK_SELECT(Bfloat)
RK_SELECT(float)
RK_SELECT(double)
#undef RK_SELECT

}  // namespace RK_ISA
}  // namespace rk
