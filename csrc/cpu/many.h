// Selection among more rows than registers: in two sorted parts (merge.h), from 257 rows on by counting (pivot.h).
#pragma once
#include "merge.h"
#include "pivot.h"
#include "sorted.h"

namespace rk {
namespace RK_ISA {

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
      typename Sorted<S>::Count nan_cells;
      Sorted<S>::patch(src, window.n, at, x, nonfinite, nan_cells);
      select(out + at);
      spoil_nan(window, nan_cells, out + at);
    } else {
      select(out + at);
    }
    ahead.step();
  }
}

}  // namespace RK_ISA
}  // namespace rk
