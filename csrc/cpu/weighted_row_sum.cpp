// Compiled once per instruction set: weighted_row_sum.
#include "walk.h"

namespace rk {
namespace RK_ISA {
namespace {

// A row at a time: memory likes long runs (mean of 64 rows: 2.2 reads, 1.1 so).
template <class S>
constexpr int64_t kSumColumns = sizeof(S) == 8 ? 1024 : 2048;
constexpr int64_t kSumRows = 4;  // or some rows: sums are loaded and stored once for them

bool is_power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits << 12 == 0;  // of numbers that are not subnormal
}

enum class Terms { plain, shrunken, lifted };  // float64 values as they are, times kRoom, times kLift
// sums[j] (+)= the weighted values of kCount rows in their order; `columns` is a multiple of the vector. Meanwhile
// fetches as much of the rows `next`. Of float64 rows with what the roundings lost, after the sums; kExact: products
// with powers of two lose nothing.
template <int64_t kCount, Terms kTerms, bool kExact, class S>
RK_INLINE void add_rows(const S* const* rows, const S* const* next, const double* weights, int64_t columns, bool begin,
                        double* sums) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  F64 factor[kCount];
  for (int64_t i = 0; i < kCount; ++i) factor[i] = splat<F64>(weights[i]);
  for (int64_t j = 0; j < columns; j += kDoubles) {
    if (j % line == 0)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSumRows; ++i) __builtin_prefetch(next[i] + j, 0, 2);
    if constexpr (sizeof(S) == 8) {
      double *high = sums + j, *low = sums + kSumColumns<S> + j;
      DoubledSum sum = {};
      if (!begin) sum = {load(high), load(low)};
#pragma GCC unroll 4
      for (int64_t i = 0; i < kCount; ++i) {
        const F64 x = load(rows[i] + j);
        const F64 value = kTerms == Terms::shrunken ? x * kRoom : kTerms == Terms::lifted ? lifted(x) : x;
        if (kExact)
          add(sum, factor[i] * value);
        else
          add_product(sum, factor[i], value);
      }
      store(high, sum.high);
      store(low, sum.low);
    } else {
      F64 sum = begin ? F64{} : load(sums + j);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kCount; ++i) sum = fmadd(factor[i], load_double(rows[i] + j), sum);
      store(sums + j, sum);
    }
  }
}

template <class S>
struct Call {
  const Rows& rows;
  const double *weights, *divisors;
  int64_t k;
  void* const* out;
  const int64_t n = rows.n, width = min64(kSumColumns<S>, round_up(rows.columns(), kDoubles));
  const Grid grid = make_grid(rows, max64((int64_t{1} << 18) / max64(n, 1) / kSumColumns<S>, 1) * kSumColumns<S>,
                              kSumColumns<S>, kDoubles);
  const bool streamed = rows.columns() * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;
};

template <class S>
class Worker : public Steps {
 public:
  using C = ComputeOf<S>;
  explicit Worker(const Call<S>& call) : call_(call) {}

  void lay(Layout& at) {
    at(used_, call_.n);
    at(factor_, call_.n);
    at(sums_, sizeof(S) == 8 ? kSumColumns<S> + call_.width : call_.width);
    at(tail_, kSumRows * kDoubles);
    at(rounded_, call_.width);
    at(stored_, call_.width);
  }
  void run(const Tile& tile) {
    for (int64_t r = 0; r < call_.k; ++r) {  // all sums of a tile that stays in cache: one read of the data
      weights_ = call_.weights + r * call_.n;
      const Average average = average_of(weights_, call_.n, call_.divisors ? call_.divisors[r] : 1);
      if constexpr (sizeof(S) == 8)
        round_doubles(tile, average);
      else
        round_singles(tile, average);
      narrow_run(rounded_, tile.columns, stored_);
      write_tile(call_.out[tile.segment * call_.k + r], tile, stored_, call_.streamed);
    }
  }

 private:
  // ---- sums: of rows with some weight, the others are not looked at, in row order ----

  template <Terms kTerms>
  void add(const Tile& tile, double lift) {
    constexpr bool kMayBeExact = sizeof(S) == 8 && kTerms == Terms::plain;
    bool exact = kMayBeExact;
    n_used_ = 0;
    for (int64_t i = 0; i < call_.n; ++i)
      if (weights_[i] != 0) {
        used_[n_used_] = i;
        factor_[n_used_] = weights_[i] * lift;
        exact &= is_power_of_two(factor_[n_used_++]);
      }
    for (int64_t i = 0; i < n_used_; i += kSumRows)
      if (exact)
        add_some<kTerms, kMayBeExact>(tile, i);
      else
        add_some<kTerms, false>(tile, i);
    if (n_used_ > 0) return;
    const size_t bytes = sizeof(double) * static_cast<size_t>(round_up(tile.columns, kDoubles));
    memset(sums_, 0, bytes);
    if (sizeof(S) == 8) memset(sums_ + kSumColumns<S>, 0, bytes);
  }
  // Up to kSumRows of the rows that are used, from i on.
  template <Terms kTerms, bool kExact>
  void add_some(const Tile& tile, int64_t i) {
    const int64_t count = min64(kSumRows, n_used_ - i), padded = round_up(tile.columns, kDoubles);
    const S *src[kSumRows], *next[kSumRows];
    for (int64_t p = 0; p < kSumRows; ++p) {
      const int64_t then = i + count + p < n_used_ ? i + count + p
                           : i + count < n_used_   ? i + count
                                                   : min64(p, n_used_ - 1);
      next[p] = tile.of<S>(call_.rows, used_[then]) + (i + count < n_used_ ? 0 : tile.columns);
    }
    for (int64_t p = 0; p < count; ++p) {
      src[p] = tile.of<S>(call_.rows, used_[i + p]);
      if (tile.columns < kDoubles) {
        memset(tail_ + p * kDoubles, 0, sizeof(S) * kDoubles);
        memcpy(tail_ + p * kDoubles, src[p], sizeof(S) * static_cast<size_t>(tile.columns));
        src[p] = tail_ + p * kDoubles;
      }
    }
    if (count == 4)
      add_rows<4, kTerms, kExact>(src, next, factor_ + i, padded, i == 0, sums_);
    else if (count == 3)
      add_rows<3, kTerms, kExact>(src, next, factor_ + i, padded, i == 0, sums_);
    else if (count == 2)
      add_rows<2, kTerms, kExact>(src, next, factor_ + i, padded, i == 0, sums_);
    else
      add_rows<1, kTerms, kExact>(src, next, factor_ + i, padded, i == 0, sums_);
  }

  // ---- quotients ----

  void round_singles(const Tile& tile, const Average& average) {
    const Divisor by(average.divisor, average.reciprocal);
    add<Terms::plain>(tile, average.lift);
    const auto round = [&](auto&& quotient) {
      F64 check = {};
      for (int64_t j = 0; j < tile.columns; j += kDoubles) {
        const F64 value = quotient(load(sums_ + j));
        check = fmadd(value, F64{}, check);
        store_rounded(rounded_ + j, sizeof(S) == 2 ? to_odd(value) : value);
      }
      return any_nan(check);
    };
    const bool again = round([&](F64 sum) { return divided(sum, by); });
    if (__builtin_expect(again, false)) round([&](F64 sum) { return sum / by.value; });
  }

  static RK_INLINE Simd<double>::Key is_tiny(F64 value) {
    return reinterpret_cast<Simd<double>::Key>(size_of(value) < kTiny);
  }
  DoubledSum sum(int64_t j) const { return {load(sums_ + j), load(sums_ + kSumColumns<S> + j)}; }

  void round_doubles(const Tile& tile, const Average& average) {
    const Divisor by(average.divisor, average.reciprocal);
    F64 check = {};
    Simd<double>::Key tiny = {};
    {
      const FlushedFloats floats(average.averaging);  // only averages that are tiny rest on subnormal numbers
      add<Terms::plain>(tile, average.lift);
      for (int64_t j = 0; j < tile.columns; j += kDoubles) {
        const F64 value = divided(sum(j), by);
        check = fmadd(value, F64{}, check);
        tiny |= is_tiny(value);
        store(rounded_ + j, value);
      }
    }
    if (average.averaging && any_nan(reinterpret_cast<F64>(tiny))) round_tiny(tile, average.lift, by);
    if (__builtin_expect(any_nan(check), false)) {
      const FlushedFloats floats(average.averaging);
      add<Terms::shrunken>(tile, average.lift);
      replace(
          tile, [](F64 value) { return value - value != 0; },
          [&](const DoubledSum& found) { return grown(found, average.divisor, average.averaging); });
    }
  }
  // The tiny averages again, of numbers that may be subnormal.
  void round_tiny(const Tile& tile, double lift, const Divisor& by) {
    const auto tiny = [](F64 value) { return size_of(value) < kTiny; };
    const Liftable found = where_tiny(tile);
    if (found.liftable()) {
      const FlushedFloats floats(true);
      add<Terms::lifted>(tile, lift);
      replace(tile, tiny, [&](const DoubledSum& lifted_sum) { return lowered(divided(lifted_sum, by)); });
    } else if (!found.zero()) {
      add<Terms::plain>(tile, lift);
      replace(tile, tiny, [&](const DoubledSum& whole) { return divided(whole, by); });
    }
  }
  // What numbers there are in columns of tiny averages.
  Liftable where_tiny(const Tile& tile) const {
    Liftable found;
    for (int64_t i = 0; i < call_.n; ++i) {
      if (weights_[i] == 0) continue;
      const S* row = tile.of<S>(call_.rows, i);
      for (int64_t j = 0; j < tile.columns; j += kDoubles) {
        double tail[kDoubles] = {};
        if (j + kDoubles > tile.columns) memcpy(tail, row + j, sizeof(S) * static_cast<size_t>(tile.columns - j));
        const F64 value = load(j + kDoubles > tile.columns ? tail : row + j);
        found.look(size_of(load(rounded_ + j)) < kTiny ? value : F64{});
      }
    }
    return found;
  }
  // rounded = result(sum), where a value is wanted anew.
  template <class Wanted, class Result>
  void replace(const Tile& tile, Wanted&& wanted, Result&& result) {
    for (int64_t j = 0; j < tile.columns; j += kDoubles) {
      const F64 value = load(rounded_ + j);
      store(rounded_ + j, wanted(value) ? result(sum(j)) : value);
    }
  }

  const Call<S>& call_;
  const double* weights_ = nullptr;  // of the sum at work
  int64_t *used_ = nullptr, n_used_ = 0;
  double *factor_ = nullptr, *sums_ = nullptr;
  S *tail_ = nullptr, *stored_ = nullptr;
  C* rounded_ = nullptr;
};

}  // namespace

Status weighted_row_sum(const Rows& rows, const double* weights, const double* divisors, int64_t k, void* const* out,
                        int threads) {
  return by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    const Call<S> call{rows, weights, divisors, k, out};
    return walk<Worker<S>>(call, threads) ? Status::ok : Status::out_of_memory;
  });
}

}  // namespace RK_ISA
}  // namespace rk
