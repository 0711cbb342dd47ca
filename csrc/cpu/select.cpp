// Compiled once per instruction set: sorting networks with one column in each SIMD lane.
// Up to 32 rows the network is unrolled in registers (medians pruned for the exact n; other windows as a full
// sort padded to a multiple of 4 rows); above that, and with multiplicities, a network built at run time and
// pruned to the window runs over values that stay in the first-level cache.
#include "select.h"

#include <stdlib.h>

#include "../common/networks.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int kUnrolledRows = 32;
constexpr int kPrefetchVectors = 8;  // how far ahead each row is fetched: many streams defeat the hardware

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <class C>
constexpr C infinity() {
  return static_cast<C>(__builtin_inf());
}

// ---- from sorted values to the result ------------------------------------------------------------------

// Mean of sorted[lo..hi) per lane, written to out. Summed as differences from the smallest, so that a large common
// offset costs no digits; where that overflows or meets an infinity, as a plain scaled sum in float64.
template <class C>
RK_INLINE void store_window_mean(const typename Simd<C>::V* sorted, int64_t lo, int64_t hi, C* out) {
  using V = typename Simd<C>::V;
  if (hi - lo == 1) {
    store(out, sorted[lo]);
    return;
  }
  if (hi - lo == 2) {
    const V a = sorted[lo], b = sorted[lo + 1];
    V middle = (a + b) * static_cast<C>(0.5);
    if (__builtin_expect(any_nan(middle * static_cast<C>(0)), false))
      middle = a * static_cast<C>(0.5) + b * static_cast<C>(0.5);
    store(out, middle);
    return;
  }
  constexpr int lanes = Simd<C>::lanes;
  if (sizeof(C) == 4 && hi - lo <= kUnrolledRows) {
    // Few enough that float32 keeps them within 3e-7 of the spread.
    const V base = sorted[lo];
    V sum[2] = {V{}, sorted[lo + 1] - base};
    for (int64_t r = lo + 2; r < hi; ++r) sum[r & 1] += sorted[r] - base;
    const V mean = base + (sum[0] + sum[1]) / static_cast<C>(hi - lo);
    if (__builtin_expect(!any_nan(mean * static_cast<C>(0)), true)) {
      store(out, mean);
      return;
    }
  }
  const C* cells = reinterpret_cast<const C*>(sorted);
  const double count = static_cast<double>(hi - lo);
  for (int part = 0; part < lanes; part += kDoubles) {
    const F64 base = load_double(cells + lo * lanes + part);
    F64 sum = base - base;
    for (int64_t r = lo + 1; r < hi; ++r) sum += load_double(cells + r * lanes + part) - base;
    F64 mean = base + sum / count;
    if (__builtin_expect(any_nan(mean * 0.0), false)) {
      mean = load_double(cells + lo * lanes + part) / count;
      for (int64_t r = lo + 1; r < hi; ++r) mean += load_double(cells + r * lanes + part) / count;
    }
    store_rounded(out + part, mean);
  }
}

// Replaces NaN by +inf (they sort alike), notes the rows that hold a NaN or Inf and counts the NaN per column.
template <class C>
__attribute__((noinline)) void patch_nonfinite(const C* const* src, int64_t n, int64_t at, C* patched,
                                               int64_t* nan_cells, const int64_t* multiplicities, uint8_t* nonfinite) {
  constexpr int lanes = Simd<C>::lanes;
  for (int lane = 0; lane < lanes; ++lane) nan_cells[lane] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int lane = 0; lane < lanes; ++lane) {
      C x = load_scalar(src[i] + at + lane);
      if (x - x != 0) nonfinite[i] = 1;
      if (x != x) {
        x = infinity<C>();
        nan_cells[lane] += multiplicities ? multiplicities[i] : 1;
      }
      patched[i * lanes + lane] = x;
    }
  }
}

// A window that reaches a NaN gives NaN.
template <class C>
void spoil_nan(const Window& window, const int64_t* nan_cells, C* out) {
  for (int lane = 0; lane < Simd<C>::lanes; ++lane)
    if (nan_cells[lane] > 0 && window.hi > window.total - nan_cells[lane])
      out[lane] = static_cast<C>(__builtin_nan(""));
}

// ---- unrolled networks ---------------------------------------------------------------------------------

// N wires; kMedian: pruned to the middle ranks of exactly N rows, else a full sort of at most N rows.
template <class C, int N, bool kMedian>
struct Unrolled {
  using V = typename Simd<C>::V;
  static constexpr int lanes = Simd<C>::lanes;
  static constexpr FixedNetwork<N> network{kMedian ? (N - 1) / 2 : 0, kMedian ? N / 2 + 1 : N};

  template <int... I>
  static RK_INLINE void sort(V (&x)[N], Indices<I...>) {
    (
        [&] {
          constexpr int low = network.net[I].low, high = network.net[I].high;
          const V smaller = vmin(x[low], x[high]);
          x[high] = vmax(x[low], x[high]);
          x[low] = smaller;
        }(),
        ...);
  }

  static RK_INLINE void sort_and_store(V (&x)[N], const Window& window, C* out) {
    sort(x, typename MakeIndices<network.count>::type{});
    if constexpr (kMedian) {
      // Only the middle is in order; an even N offers its low, its high or their mean.
      constexpr int low = (N - 1) / 2, high = N / 2;
      if (window.hi - window.lo == 2) {
        V middle[2] = {x[low], x[high]};
        store_window_mean<C>(middle, 0, 2, out);
      } else {
        store(out, window.lo == low ? x[low] : x[high]);
      }
    } else {
      V sorted[N];
      for (int i = 0; i < N; ++i) sorted[i] = x[i];
      store_window_mean<C>(sorted, window.lo, window.hi, out);
    }
  }

  static void run(const Window& window, const C* const* src, int64_t columns, C*, C* out, uint8_t* nonfinite) {
    const int rows = kMedian ? N : static_cast<int>(window.n);
    for (int64_t at = 0; at < columns; at += lanes) {
      V x[N];
      V check = {};
      for (int i = 0; i < N; ++i) {
        if (kMedian || i < N - 3 || i < rows) {
          x[i] = load(src[i] + at);
          check = fmadd(x[i], V{}, check);
          __builtin_prefetch(src[i] + at + kPrefetchVectors * lanes);
        } else {
          x[i] = V{} + infinity<C>();
        }
      }
      if (__builtin_expect(any_nan(check), false))
        run_patched(window, src, at, out + at, nonfinite);
      else
        sort_and_store(x, window, out + at);
    }
  }

  static __attribute__((noinline)) void run_patched(const Window& window, const C* const* src, int64_t at, C* out,
                                                    uint8_t* nonfinite) {
    C patched[N * lanes];
    int64_t nan_cells[lanes];
    patch_nonfinite(src, window.n, at, patched, nan_cells, static_cast<const int64_t*>(nullptr), nonfinite);
    V x[N];
    for (int i = 0; i < N; ++i) x[i] = i < window.n ? load(patched + i * lanes) : V{} + infinity<C>();
    sort_and_store(x, window, out);
    spoil_nan(window, nan_cells, out);
  }
};

template <class C>
using Selector = void (*)(const Window&, const C* const*, int64_t, C*, C*, uint8_t*);

template <class C, int... I>
Selector<C> unrolled_median(int64_t n, Indices<I...>) {
  static constexpr Selector<C> table[] = {&Unrolled<C, I + 1, true>::run...};
  return table[n - 1];
}
template <class C, int... I>
Selector<C> unrolled_sort(int64_t n, Indices<I...>) {
  static constexpr Selector<C> table[] = {&Unrolled<C, 4 * (I + 1), false>::run...};
  return table[(n - 1) / 4];
}

bool is_median(const Window& w) { return w.lo >= (w.n - 1) / 2 && w.hi <= w.n / 2 + 1; }
bool is_unrolled(const Window& w) { return w.n <= kUnrolledRows && !w.multiplicities; }

// ---- networks built at run time ------------------------------------------------------------------------

template <class C>
void run_network(const Window& window, const C* const* src, int64_t columns, C* scratch, C* out, uint8_t* nonfinite) {
  using V = typename Simd<C>::V;
  constexpr int lanes = Simd<C>::lanes;
  V* x = reinterpret_cast<V*>(scratch);
  const Comparator* net = static_cast<const Comparator*>(window.network);
  for (int64_t at = 0; at < columns; at += lanes) {
    V check = {};
    for (int64_t i = 0; i < window.n; ++i) {
      x[i] = load(src[i] + at);
      check = fmadd(x[i], V{}, check);
      __builtin_prefetch(src[i] + at + kPrefetchVectors * lanes);
    }
    int64_t nan_cells[lanes];
    const bool careful = any_nan(check);
    if (__builtin_expect(careful, false))
      patch_nonfinite(src, window.n, at, scratch, nan_cells, static_cast<const int64_t*>(nullptr), nonfinite);
    for (int64_t c = 0; c < window.comparators; ++c) {
      const V a = x[net[c].low], b = x[net[c].high];
      x[net[c].low] = vmin(a, b);
      x[net[c].high] = vmax(a, b);
    }
    store_window_mean<C>(x, window.lo, window.hi, out + at);
    if (__builtin_expect(careful, false)) spoil_nan(window, nan_cells, out + at);
  }
}

// One column's sorted values and their rows, a lane apart: the mean over the cells [lo, hi).
template <class C, class I>
C weighted_window_mean(const Window& window, const C* sorted, const I* row) {
  constexpr int lanes = Simd<C>::lanes;
  const double cells = static_cast<double>(window.hi - window.lo);
  int64_t before = 0;
  int contributions = 0;
  double base = 0, centred = 0, plain = 0, first_share = 0, last_share = 0, last = 0;
  for (int64_t r = 0; r < window.n && before < window.hi; ++r) {
    const int64_t after = before + window.multiplicities[row[r * lanes]];
    const int64_t from = max64(before, window.lo), to = min64(after, window.hi);
    before = after;
    if (to <= from) continue;
    const double share = static_cast<double>(to - from) / cells, x = static_cast<double>(sorted[r * lanes]);
    if (contributions++ == 0) {
      base = x;
      first_share = share;
    }
    centred += share * (x - base);
    plain += share * x;
    last = x;
    last_share = share;
  }
  if (contributions == 1) return static_cast<C>(base);
  // Two equal halves are the unweighted median's middle: the same rounding as there.
  if (contributions == 2 && first_share == last_share) {
    const C sum = static_cast<C>(base) + static_cast<C>(last);
    if (sum - sum == 0) return sum * static_cast<C>(0.5);
    return static_cast<C>(base) * static_cast<C>(0.5) + static_cast<C>(last) * static_cast<C>(0.5);
  }
  const double mean = base + centred;
  return static_cast<C>(mean - mean == 0 ? mean : plain);
}

// Values and the rows they come from are sorted together.
template <class C>
void run_weighted(const Window& window, const C* const* src, int64_t columns, C* scratch, C* out, uint8_t* nonfinite) {
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
    int64_t nan_cells[lanes];
    const bool careful = any_nan(check);
    if (__builtin_expect(careful, false))
      patch_nonfinite(src, window.n, at, scratch, nan_cells, window.multiplicities, nonfinite);
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
    if (__builtin_expect(careful, false)) spoil_nan(window, nan_cells, out + at);
  }
}

template <class C>
void run(const Window& window, const C* const* src, int64_t columns, C* scratch, C* out, uint8_t* nonfinite) {
  Selector<C> selector = &run_network<C>;
  if (window.multiplicities)
    selector = &run_weighted<C>;
  else if (is_unrolled(window))
    selector = is_median(window) ? unrolled_median<C>(window.n, MakeIndices<kUnrolledRows>::type{})
                                 : unrolled_sort<C>(window.n, MakeIndices<kUnrolledRows / 4>::type{});
  selector(window, src, columns, scratch, out, nonfinite);
}

}  // namespace

bool prepare_window(Window& window) {
  window.network = nullptr;
  window.comparators = 0;
  window.total = window.n;
  if (window.multiplicities) {
    window.total = 0;
    for (int64_t i = 0; i < window.n; ++i) window.total += window.multiplicities[i];
  }
  if (is_unrolled(window)) return true;
  const int n = static_cast<int>(window.n);
  int count = 0;
  merge_exchange(n, [&](int, int) { ++count; });
  Comparator* net = static_cast<Comparator*>(malloc(sizeof(Comparator) * static_cast<size_t>(count + 1)));
  bool* needed = static_cast<bool*>(malloc(static_cast<size_t>(n)));
  if (!net || !needed) {
    free(net);
    free(needed);
    return false;
  }
  int filled = 0;
  merge_exchange(n, [&](int low, int high) {
    net[filled++] = {static_cast<unsigned short>(low), static_cast<unsigned short>(high)};
  });
  const bool all = window.multiplicities != nullptr;  // which rank a window of cells reaches depends on the column
  window.comparators =
      prune(net, filled, needed, n, all ? 0 : static_cast<int>(window.lo), all ? n : static_cast<int>(window.hi));
  window.network = net;
  free(needed);
  return true;
}

void release_window(Window& window) { free(window.network); }

int64_t select_scratch(const Window& window, bool is_double) {
  return 2 * window.n * (is_double ? Simd<double>::lanes : Simd<float>::lanes);
}

void select_tile(const Window& window, const float* const* src, int64_t columns, float* scratch, float* out,
                 uint8_t* nonfinite) {
  run<float>(window, src, columns, scratch, out, nonfinite);
}
void select_tile(const Window& window, const double* const* src, int64_t columns, double* scratch, double* out,
                 uint8_t* nonfinite) {
  run<double>(window, src, columns, scratch, out, nonfinite);
}

}  // namespace RK_ISA
}  // namespace rk
