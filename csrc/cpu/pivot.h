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

// The search for a cut with least <= below <= most in every lane; 0 < least <= most < n, no value is a NaN.
template <class C>
class Search {
 public:
  using V = typename Simd<C>::V;
  using Key = typename Simd<C>::Key;
  using Index = typename Simd<C>::Index;
  using I = typename Simd<C>::IndexScalar;

  RK_INLINE Search(const V* x, int64_t n, int64_t least, int64_t most)
      : x_(x),
        n_(n),
        first_(Index{} + static_cast<I>(least)),
        last_(Index{} + static_cast<I>(most)),
        aim_(V{} + static_cast<C>(0.5) * static_cast<C>(least + most)),
        high_count_(Index{} + static_cast<I>(n)) {}

  RK_INLINE Cut<C> run(Guess<C>& guess) {
    V pivot = guess.at, spacing = guess.spacing;
    if (guess.row[0] > 0) pivot = from_row(x_[guess.row[0] - 1], spacing);
    int pass = 0;
    for (; any_set(open_) && pass < kMostPasses<C>; ++pass) {
      const int turn = pass > kGuidedPasses ? pass % 3 : 2;
      if (turn == 0)  // the smallest value in the bracket
        snap(open_, smallest_from<C>(x_, n_, low_), low_count_);
      else
        halve(turn == 1, pivot, spacing);
    }
    cut_.tied |= open_;
    close(open_, low_, low_count_);
    guess.at = cut_.at;
    guess.spacing = spacing;
    if (pass > kGuidedPasses) guess.row[0] = row_near<C>(x_, n_, cut_.at, spacing * static_cast<C>(n_ / 4));
    return cut_;
  }

 private:
  static RK_INLINE V values(Index counts) { return __builtin_convertvector(counts, V); }
  RK_INLINE void close(Index where, V at, Index below) {
    cut_.at = where ? at : cut_.at;
    cut_.below = where ? below : cut_.below;
    open_ &= ~where;
  }
  RK_INLINE void raise(Index where, V to, Key key, Index count) {
    low_ = where ? to : low_;
    low_key_ = where ? key : low_key_;
    low_count_ = where ? count : low_count_;
  }
  RK_INLINE void lower(Index where, V to, Key key, Index count) {
    high_ = where ? to : high_;
    high_key_ = where ? key : high_key_;
    high_count_ = where ? count : high_count_;
  }
  // Fewer than `least` values are below a value that is there: how many equal it?
  RK_INLINE void snap(Index where, V found, Index below) {
    const V after = next_above<C>(found);
    const Index count = count_below<C>(x_, n_, after);  // all of them where `after` is the key after +inf, a NaN
    const Index up_to = found == infinity<C>() ? Index{} + static_cast<I>(n_) : count;
    const Index over = where & (up_to > last_);
    cut_.tied |= over;
    close(over, found, below);
    close(where & ~over & (up_to >= first_), after, up_to);
    raise(where & open_, after, key_of<C>(after), up_to);
  }
  // Attackers who copy a row, or nearly, do so in every column. Returns the first pivot.
  RK_INLINE V from_row(V found, V spacing) {
    const Index below = count_below<C>(x_, n_, found), over = below > last_;
    close((below >= first_) & ~over, found, below);
    lower(over, found, key_of<C>(found), below);
    snap(below < first_, found, below);
    return found + (aim_ - values(below)) * spacing;
  }
  // Counts below the pivot, or, where it is outside the bracket or not to be trusted, below the middle of the keys;
  // then chooses the next one.
  RK_INLINE void halve(bool in_the_middle, V& pivot, V& spacing) {
    const Key half = low_key_ + ((high_key_ - low_key_) >> 1);
    const Index inside = (pivot > low_) & (pivot < high_);
    pivot = in_the_middle ? number_of<C>(half) : inside ? pivot : number_of<C>(half);
    const Index count = count_below<C>(x_, n_, pivot);
    close(open_ & (count >= first_) & (count <= last_), pivot, count);
    raise(open_ & (count < first_), pivot, key_of<C>(pivot), count);
    lower(open_ & (count > last_), pivot, key_of<C>(pivot), count);
    // No number between low and high: what lies there equals low.
    const Index shut = open_ & (((high_key_ - low_key_) >> 1) == 0);
    cut_.tied |= shut;
    close(shut, low_, low_count_);
    // Interpolate between the ends where both are known, else step away from the last pivot.
    const V width = high_ - low_, counted = values(high_count_ - low_count_);
    const Index both = width * 0 == 0;
    const V stepped = pivot + (aim_ - values(count)) * spacing;
    pivot = both ? low_ + width * ((aim_ - values(low_count_)) / counted) : stepped;
    spacing = both ? width / counted : spacing + spacing;
  }

  const V* x_;
  int64_t n_;
  Index first_, last_;
  V aim_;
  // Fewer than `least` values are below low, more than `most` below high (all of them below the key after +inf).
  V low_ = V{} - infinity<C>(), high_ = V{} + infinity<C>();
  Key low_key_ = key_of<C>(low_), high_key_ = key_of<C>(high_) + 1;
  Index low_count_ = {}, high_count_;
  Index open_ = Index{} - 1;  // lanes that are still searched
  Cut<C> cut_{V{}, Index{}, Index{}};
};

template <class C>
Cut<C> find_cut(const typename Simd<C>::V* x, int64_t n, int64_t least, int64_t most, Guess<C>& guess) {
  return Search<C>(x, n, least, most).run(guess);
}

}  // namespace RK_ISA
}  // namespace rk
