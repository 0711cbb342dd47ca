// Compiled once per instruction set: selection with one column in each SIMD lane.
// Up to 32 rows a sorting network is unrolled in registers (medians pruned for the exact n; other windows as a full
// sort padded to a multiple of 4 rows); above that the window's ends are found in two sorted parts (merge.h), from 257
// rows on by counting (pivot.h). With multiplicities values and their rows are sorted by a network built at run time.
// 16-bit values are sorted as integers, twice as many to a vector.
#include "select.h"

#include "many.h"
#include "weighted.h"

namespace rk {
namespace RK_ISA {
namespace {

// How many rows the hardware follows; above, whole runs of rows are fetched (Ahead). Median of 32 rows: 1.0 against 1.3
// reads on Granite Rapids, but 2.3 against 1.9 on Zen 3.
constexpr int kFollowedRows = kVectorBytes == 64 ? 32 : 16;

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
      typename Sorted<S>::Count nan_cells;
      const bool patched = __builtin_expect(Sorted<S>::special(check[0], check[1]), false);
      if (patched) {
        V again[N];
        Sorted<S>::patch(src, window.n, at, again, nonfinite, nan_cells);
#pragma GCC unroll 32
        for (int i = 0; i < N; ++i)
          if (kMedian || i < N - 3 || i < rows) x[i] = again[i];
      }
      sort_and_store(x, window, out + at, ahead);
      if (patched) spoil_nan<typename Sorted<S>::Count>(window, nan_cells, out + at);
      if (N > kFollowedRows) ahead.step();
    }
  }
};

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

bool Window::prepare() {
  total = n;
  // Many rows are cut at a value; what is near to the mean of a window is found among sorted ones.
  const bool sorts = nearest && hi - lo > 2 && n > kSortedRows;
  if (!multiplicities && !sorts) return true;
  if (multiplicities && !prepare_cells(*this)) return false;
  int count = 0;
  sorting_network(static_cast<int>(n), [&](int, int) { ++count; });
  Comparator* net = static_cast<Comparator*>(malloc(sizeof(Comparator) * static_cast<size_t>(count + 1)));
  if (!net) return false;
  // Which rank a window of cells reaches depends on the column: nothing to prune.
  sorting_network(static_cast<int>(n), [&](int low, int high) {
    net[comparators++] = {static_cast<unsigned short>(low), static_cast<unsigned short>(high)};
  });
  network = net;
  return true;
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
