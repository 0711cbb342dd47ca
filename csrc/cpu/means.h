// From the sorted values of columns, one in each SIMD lane, to the mean of a window or of the values nearest to it.
#pragma once
#include "select.h"
#include "sums.h"

namespace rk {
namespace RK_ISA {

constexpr int kUnrolledRows = 32;  // are sorted in registers

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

}  // namespace RK_ISA
}  // namespace rk
