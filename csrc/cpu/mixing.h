// Rows of mixtures, tile by tile: those that a selection, or its distances, are over. None is stored beyond a tile.
#pragma once
#include "walk.h"

namespace rk {
namespace RK_ISA {

constexpr int64_t kMixRows = 4;  // mixtures made together,
static_assert(kMixRows <= kMostTogether, "shared_row looks at so many");
constexpr int64_t kMixVectors = kVectorBytes == 64 ? 4 : 2;  // and vectors of each: the sums fit the registers

// A matrix of weights and divisors in the order in which it is used: for each group of up to kMixRows mixtures the rows
// of which any of them takes some, and their weights side by side. Of float64 rows (kCentred) differences from a row
// that all mixtures of a group take are summed: equal rows so come back as they are, at the speed of plain sums.
template <bool kCentred>
class Mixing {
 public:
  bool prepare(const double* weights, const double* divisors, int64_t k, int64_t n) {
    n_ = n;
    const auto lay = [&](Layout& at) {
      at(first_, k + 1);
      at(base_, k);
      at(average_, k);
    };
    if (!outline_.allocate(lay)) return false;
    for (int64_t r = 0; r < k; ++r) {
      average_[r] = average_of(weights + r * n, n, divisors ? divisors[r] : 1);
      averaging_ &= average_[r].averaging;
    }
    for (int64_t r = 0; r < k;) {
      int64_t count = min64(kMixRows, k - r);
      if (kCentred)
        while ((base_[groups_] = shared_row(weights, n, r, count)) == n && count > 1) --count;
      first_[groups_++] = r;
      r += count;
    }
    first_[groups_] = k;
    return prepare_factors(weights);
  }
  int64_t groups() const { return groups_; }
  bool averaging() const { return averaging_; }  // all of them

  // mixed[r * tile + j] = sum over i of weights[r, i] * x[i * tile + j], over the divisor, also or only rounded to C
  // (either may be null); of a tile that is lifted, lowered again. A row with a NaN or Inf (not finite[i]) is never
  // multiplied by 0.
  template <class C>
  void run(const double* x, int64_t columns, int64_t tile, const uint8_t* finite, double* mixed, C* rounded,
           Ahead& ahead, bool is_lifted) const {
    const FlushedFloats floats(is_lifted);
    const auto put = [&](int64_t r, int64_t j, F64 value) {
      if (kCentred && is_lifted) value = lowered(value);
      if (mixed) store(mixed + r * tile + j, value);
      if (rounded) store_rounded(rounded + r * tile + j, value);
    };
    for (int64_t g = 0; g < groups_; ++g) {
      ahead.step();
      bool special = false;
      for (int64_t u = start_[g]; u < start_[g + 1]; ++u) special |= !finite[row_[u]];
      int64_t j = 0;
      if (__builtin_expect(!special, true))
        for (; j + kMixVectors * kDoubles <= columns; j += kMixVectors * kDoubles)
          mix<kMixVectors>(g, x + j, tile, j, put);
      for (; j < columns; j += kDoubles)
        if (!special)
          mix<1>(g, x + j, tile, j, put);
        else
          for (int64_t r = first_[g]; r < first_[g + 1]; ++r) put(r, j, mixture(g, r, x + j, tile));
    }
  }

 private:
  bool prepare_factors(const double* weights) {
    const auto lay = [&](Layout& at) {
      at(start_, groups_ + 1);
      at(row_, groups_ * n_);
      at(factor_, groups_ * n_ * kMixRows);
    };
    if (!space_.allocate(lay)) return false;
    int64_t used = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      start_[g] = used;
      for (int64_t i = 0; i < n_; ++i) {
        bool any = false;
        for (int64_t p = 0; p < kMixRows; ++p) {
          const int64_t r = first_[g] + p;
          factor_[used * kMixRows + p] = r < first_[g + 1] ? weights[r * n_ + i] * average_[r].lift : 0;
          any |= factor_[used * kMixRows + p] != 0;
        }
        row_[used] = i;
        used += any;
      }
    }
    start_[groups_] = used;
    return true;
  }

  RK_INLINE F64 base_of(int64_t g, const double* x, int64_t tile) const {
    return kCentred && base_[g] < n_ ? load(x + base_[g] * tile) : F64{};
  }
  RK_INLINE F64 finished(int64_t r, F64 base, F64 sum) const {
    const Divisor divisor(average_[r].divisor, average_[r].reciprocal);
    return kCentred ? moved(base * average_[r].whole, sum, divisor) : divided(sum, divisor);
  }

  template <int64_t kVectors, class Put>
  RK_INLINE void mix(int64_t g, const double* x, int64_t tile, int64_t j, Put&& put) const {
    F64 sum[kMixRows][kVectors], base[kVectors], check = {};
    clear(sum);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) base[v] = base_of(g, x + v * kDoubles, tile);
    for (int64_t u = start_[g]; u < start_[g + 1]; ++u) {
      const double *row = x + row_[u] * tile, *factor = factor_ + u * kMixRows;
      F64 value[kVectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        value[v] = load(row + v * kDoubles);
        if (kCentred) value[v] -= base[v];
      }
#pragma GCC unroll 4
      for (int64_t p = 0; p < kMixRows; ++p) {
        const F64 weight = splat<F64>(factor[p]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) sum[p][v] = fmadd(weight, value[v], sum[p][v]);
      }
    }
    const int64_t count = first_[g + 1] - first_[g];
#pragma GCC unroll 4
    for (int64_t p = 0; p < kMixRows; ++p)
      if (p < count)
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
          const F64 result = finished(first_[g] + p, base[v], sum[p][v]);
          check = fmadd(result, F64{}, check);
          put(first_[g] + p, j + v * kDoubles, result);
        }
    if (__builtin_expect(any_nan(check), false))
      for (int64_t p = 0; p < count; ++p)
        for (int64_t v = 0; v < kVectors; ++v)
          put(first_[g] + p, j + v * kDoubles, mixture(g, first_[g] + p, x + v * kDoubles, tile));
  }
  // The same of one mixture, where rows are no numbers or sums overflow: a sum of an infinity or a NaN is itself the
  // result, one of numbers is taken again.
  __attribute__((noinline)) F64 mixture(int64_t g, int64_t r, const double* x, int64_t tile) const {
    const Average& average = average_[r];
    const F64 base = base_of(g, x, tile);
    F64 sum = {}, plain = {}, check = {};
    const auto for_rows = [&](auto&& add) {
      for (int64_t u = start_[g]; u < start_[g + 1]; ++u) {  // the others' rows are not looked at
        const double weight = factor_[u * kMixRows + r - first_[g]];
        if (weight != 0) add(splat<F64>(weight), load(x + row_[u] * tile));
      }
    };
    for_rows([&](F64 weight, F64 value) {
      sum = fmadd(weight, value - base, sum);
      plain = fmadd(weight, value * kRoom, plain);
      check = fmadd(value, F64{}, check);
    });
    const F64 result = finished(r, base, sum);
    if (!any_nan(result - result)) return result;
    F64 value = check == 0 ? result : plain;
    if (any_nan(check == 0 ? result - result : F64{})) {
      DoubledSum shrunken{};
      for_rows([&](F64 weight, F64 term) { add_product(shrunken, weight, term * kRoom); });
      value = check == 0 ? grown(shrunken, average.divisor, average.averaging) : plain;
    }
    return result - result == 0 ? result : value;
  }

  Workspace outline_, space_;
  double* factor_ = nullptr;
  Average* average_ = nullptr;
  // Of each group: its first mixture, the row that they are differences from, and where its rows begin.
  int64_t *first_ = nullptr, *base_ = nullptr, *start_ = nullptr, *row_ = nullptr;
  int64_t groups_ = 0, n_ = 0;
  bool averaging_ = true;
};

// A tile as float64, and which rows of it are numbers throughout. True where it is lifted, for subnormal numbers in it.
template <class S>
bool widen_tile(const S* const* src, int64_t n, int64_t columns, int64_t tile, bool may_be_lifted, double* wide,
                uint8_t* finite) {
  const FlushedFloats floats(sizeof(S) == 8);
  Liftable liftable;
  for (int64_t i = 0; i < n; ++i) {
    F64 check = {};
    for (int64_t j = 0; j < columns; j += kDoubles) {
      const F64 x = load_double(src[i] + j);
      check = fmadd(x, F64{}, check);
      if (sizeof(S) == 8) liftable.look(x);
      store(wide + i * tile + j, x);
    }
    finite[i] = !any_nan(check);
  }
  if (!may_be_lifted || !liftable.subnormal() || !liftable.liftable()) return false;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i * tile; j < i * tile + columns; j += kDoubles) store(wide + j, lifted(load(wide + j)));
  return true;
}

}  // namespace RK_ISA
}  // namespace rk
