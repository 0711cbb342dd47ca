// Selection among many rows: where to cut a column so that a given number of its values lies below, found by
// counting against pivots, one column per SIMD lane. A pass costs a comparison and an addition a value; ordinary
// data take about six passes however many rows there are, and no data more than three for each bit of a value.
#pragma once
#include "simd.h"

namespace rk {
namespace RK_ISA {

constexpr int kGuidedPasses =
    4;  // that trust interpolation; after them every third halves the bracket, every third snaps
// More than any values need: a search ends, whatever became of comparisons.
template <class C>
constexpr int kMostPasses = kGuidedPasses + 3 * (8 * static_cast<int>(sizeof(C)) + 2);

// Where a search starts: a recent cut, and the distance of neighbouring values there; or, after a long search, in lane
// 0 of `row` a row, plus one, that was near it. It decides how many passes are needed, never what they find.
template <class C>
struct Guess {
  typename Simd<C>::V at, spacing;
  typename Simd<C>::Index row;
};

// `below` of the values are less than `at`. Where tied, `at` is a value so frequent that none of the cuts asked for
// separates two values: they all fall between equals.
template <class C>
struct Cut {
  typename Simd<C>::V at;
  typename Simd<C>::Index below, tied;
};

// Floating-point numbers as integers in the same order (-0.0 just below 0.0), and back.
template <class C>
RK_INLINE typename Simd<C>::Key key_of(typename Simd<C>::V v) {
  using Key = typename Simd<C>::Key;
  using Index = typename Simd<C>::Index;
  constexpr int top = 8 * sizeof(C) - 1;
  const Key bits = reinterpret_cast<Key>(v), sign = reinterpret_cast<Key>(reinterpret_cast<Index>(v) >> top);
  return bits ^ (sign >> 1);
}
template <class C>
RK_INLINE typename Simd<C>::V number_of(typename Simd<C>::Key key) {
  return reinterpret_cast<typename Simd<C>::V>(key_of<C>(reinterpret_cast<typename Simd<C>::V>(key)));
}
// The next number above; both zeros count as one.
template <class C>
RK_INLINE typename Simd<C>::V next_above(typename Simd<C>::V v) {
  return number_of<C>(key_of<C>(v + static_cast<C>(0)) + 1);
}

template <class C>
RK_INLINE typename Simd<C>::Index count_below(const typename Simd<C>::V* x, int64_t n, typename Simd<C>::V pivot) {
  typename Simd<C>::Index count[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    count_less(count[0], x[i], pivot);
    count_less(count[1], x[i + 1], pivot);
    count_less(count[2], x[i + 2], pivot);
    count_less(count[3], x[i + 3], pivot);
  }
  for (; i < n; ++i) count_less(count[0], x[i], pivot);
  return (count[0] + count[1]) + (count[2] + count[3]);
}

template <class C>
RK_INLINE typename Simd<C>::V smallest_from(const typename Simd<C>::V* x, int64_t n, typename Simd<C>::V from) {
  using V = typename Simd<C>::V;
  V least[2] = {V{} + infinity<C>(), V{} + infinity<C>()};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    least[0] = min_where_not_less(least[0], x[i], from);
    least[1] = min_where_not_less(least[1], x[i + 1], from);
  }
  if (i < n) least[0] = min_where_not_less(least[0], x[i], from);
  return vmin(least[0], least[1]);
}

template <class C>
RK_INLINE typename Simd<C>::V largest_below(const typename Simd<C>::V* x, int64_t n, typename Simd<C>::V limit) {
  using V = typename Simd<C>::V;
  V most[2] = {V{} - infinity<C>(), V{} - infinity<C>()};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    most[0] = max_where_less(most[0], x[i], limit);
    most[1] = max_where_less(most[1], x[i + 1], limit);
  }
  if (i < n) most[0] = max_where_less(most[0], x[i], limit);
  return vmax(most[0], most[1]);
}

// The first row that is near to the cut in every lane, plus one; 0 where there is none.
template <class C>
RK_INLINE typename Simd<C>::IndexScalar row_near(const typename Simd<C>::V* x, int64_t n, typename Simd<C>::V at,
                                                 typename Simd<C>::V reach) {
  for (int64_t i = 0; i < n; ++i)
    if (!any_set((x[i] - at > reach) | (at - x[i] > reach))) return static_cast<typename Simd<C>::IndexScalar>(i + 1);
  return 0;
}

// A cut with least <= below <= most in every lane; 0 < least <= most < n, no value is a NaN.
template <class C>
Cut<C> find_cut(const typename Simd<C>::V* x, int64_t n, int64_t least, int64_t most, Guess<C>& guess) {
  using V = typename Simd<C>::V;
  using Key = typename Simd<C>::Key;
  using Index = typename Simd<C>::Index;
  using I = typename Simd<C>::IndexScalar;
  const auto values = [](Index counts) { return __builtin_convertvector(counts, V); };
  const Index first = Index{} + static_cast<I>(least), last = Index{} + static_cast<I>(most);
  const V aim = V{} + static_cast<C>(0.5) * static_cast<C>(least + most);
  // Fewer than `least` values are below low, more than `most` below high (all of them below the key after +inf).
  V low = V{} - infinity<C>(), high = V{} + infinity<C>();
  Key low_key = key_of<C>(low), high_key = key_of<C>(high) + 1;
  Index low_count = {}, high_count = Index{} + static_cast<I>(n);
  Index open = Index{} - 1;  // lanes that are still searched
  Cut<C> cut{V{}, Index{}, Index{}};
  V pivot = guess.at, spacing = guess.spacing;
  const auto close = [&](Index where, V at, Index below) {
    cut.at = where ? at : cut.at;
    cut.below = where ? below : cut.below;
    open &= ~where;
  };
  // Fewer than `least` values are below a value that is there: how many equal it?
  const auto snap = [&](Index where, V found, Index below) {
    const V after = next_above<C>(found);
    const Index count = count_below<C>(x, n, after);  // all of them where `after` is the key after +inf, a NaN
    const Index up_to = found == infinity<C>() ? Index{} + static_cast<I>(n) : count;
    const Index over = where & (up_to > last);
    cut.tied |= over;
    close(over, found, below);
    close(where & ~over & (up_to >= first), after, up_to);
    const Index under = where & open;
    low = under ? after : low;
    low_key = under ? key_of<C>(after) : low_key;
    low_count = under ? up_to : low_count;
  };
  if (guess.row[0] > 0) {  // attackers who copy a row, or nearly, do so in every column
    const V found = x[guess.row[0] - 1];
    const Index below = count_below<C>(x, n, found), over = below > last;
    close((below >= first) & ~over, found, below);
    high = over ? found : high;
    high_key = over ? key_of<C>(found) : high_key;
    high_count = over ? below : high_count;
    snap(below < first, found, below);
    pivot = found + (aim - values(below)) * spacing;
  }
  int pass = 0;
  for (; any_set(open) && pass < kMostPasses<C>; ++pass) {
    const int turn = pass > kGuidedPasses ? pass % 3 : 2;
    if (turn == 0) {  // the smallest value in the bracket
      snap(open, smallest_from<C>(x, n, low), low_count);
      continue;
    }
    const Key half = low_key + ((high_key - low_key) >> 1);
    const Index inside = (pivot > low) & (pivot < high);
    pivot = turn == 1 ? number_of<C>(half) : inside ? pivot : number_of<C>(half);
    const Index count = count_below<C>(x, n, pivot);
    close(open & (count >= first) & (count <= last), pivot, count);
    const Index under = open & (count < first), over = open & (count > last);
    low = under ? pivot : low;
    low_key = under ? key_of<C>(pivot) : low_key;
    low_count = under ? count : low_count;
    high = over ? pivot : high;
    high_key = over ? key_of<C>(pivot) : high_key;
    high_count = over ? count : high_count;
    // No number between low and high: what lies there equals low.
    const Index shut = open & (((high_key - low_key) >> 1) == 0);
    cut.tied |= shut;
    close(shut, low, low_count);
    // Interpolate between the ends where both are known, else step away from the last pivot.
    const V width = high - low, counted = values(high_count - low_count);
    const Index both = width * 0 == 0;
    const V stepped = pivot + (aim - values(count)) * spacing;
    pivot = both ? low + width * ((aim - values(low_count)) / counted) : stepped;
    spacing = both ? width / counted : spacing + spacing;
  }
  cut.tied |= open;
  close(open, low, low_count);
  guess.at = cut.at;
  guess.spacing = spacing;
  if (pass > kGuidedPasses) guess.row[0] = row_near<C>(x, n, cut.at, spacing * static_cast<C>(n / 4));
  return cut;
}

}  // namespace RK_ISA
}  // namespace rk
