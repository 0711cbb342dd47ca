// Selection with multiplicities: values and their rows, or their multiplicities, are sorted together.
#pragma once
#include "merge.h"
#include "sorted.h"

namespace rk {
namespace RK_ISA {

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
        Index unweighted;
        Sorted<C>::patch(src, window.n, at, x, nonfinite, unweighted);
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
    Index unweighted;
    if (__builtin_expect(careful, false)) Sorted<C>::patch(src, window.n, at, x, nonfinite, unweighted);
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

}  // namespace RK_ISA
}  // namespace rk
