// Sums that carry their rounding errors, and quotients that are rounded once.
#pragma once
#include "../common/averages.h"
#include "simd.h"

namespace rk {
namespace RK_ISA {

template <class V>
RK_INLINE void two_sum(V a, V b, V& sum, V& error) {  // Knuth
  sum = a + b;
  const V virtual_b = sum - a;
  error = (a - (sum - virtual_b)) + (b - virtual_b);
}

// What the rounding of a * b to `product` lost (Dekker).
RK_INLINE F64 product_error(F64 a, F64 b, F64 product) {
#if defined(__AVX512F__) || defined(__FMA__)
  return fmadd(a, b, -product);
#else
  const F64 split_a = a * 134217729.0, a_head = split_a - (split_a - a), a_tail = a - a_head;
  const F64 split_b = b * 134217729.0, b_head = split_b - (split_b - b), b_tail = b - b_head;
  return ((a_head * b_head - product) + a_head * b_tail + a_tail * b_head) + a_tail * b_tail;
#endif
}

// A sum of float64 and what its roundings lost: about 106 bits.
struct DoubledSum {
  F64 high, low;
};

// The same of single numbers.
RK_INLINE void add_doubled(double& high, double& low, double more_high, double more_low) {
  const double sum = high + more_high, virtual_b = sum - high;
  low += ((high - (sum - virtual_b)) + (more_high - virtual_b)) + more_low;
  high = sum;
}

RK_INLINE void add(DoubledSum& total, F64 x) {
  F64 lost;
  two_sum(total.high, x, total.high, lost);
  total.low += lost;
}
RK_INLINE void add_product(DoubledSum& total, F64 a, F64 b) {
  const F64 product = a * b, product_lost = product_error(a, b, product);
  F64 lost;
  two_sum(total.high, product, total.high, lost);
  total.low += lost + product_lost;
}
RK_INLINE void add_square(DoubledSum& total, F64 a, F64 b) {
  F64 difference, lost, carried;
  two_sum(a, -b, difference, lost);
  const F64 square = difference * difference;
  const F64 square_lost = product_error(difference, difference, square) + 2.0 * difference * lost;
  two_sum(total.high, square, total.high, carried);
  total.low += carried + square_lost;
}

// sum - quotient * divisor, exactly where the quotient is nearly right.
RK_INLINE F64 remainder(F64 sum, F64 quotient, F64 divisor) {
#if defined(__AVX512F__) || defined(__FMA__)
  return fmadd(-quotient, divisor, sum);
#else
  const F64 product = quotient * divisor;
  return (sum - product) - product_error(quotient, divisor, product);
#endif
}

// A number by which sums are divided, and its reciprocal: a few products are faster than a division.
struct Divisor {
  F64 value, reciprocal;
  explicit Divisor(double divisor) : Divisor(divisor, 1 / divisor) {}
  Divisor(double divisor, double its) : value(splat<F64>(divisor)), reciprocal(splat<F64>(its)) {}
};

// sum / divisor, rounded once (Markstein); of numbers only.
RK_INLINE F64 divided(F64 sum, const Divisor& by) {
#if defined(__AVX512F__) || defined(__FMA__)
  const F64 near = sum * by.reciprocal;
  return fmadd(remainder(sum, near, by.value), by.reciprocal, near);
#else
  return sum / by.value;
#endif
}
RK_INLINE F64 divided(const DoubledSum& sum, F64 divisor) {
  const F64 near = sum.high / divisor;
  return near + (remainder(sum.high, near, divisor) + sum.low) / divisor;
}
RK_INLINE F64 divided(const DoubledSum& sum, const Divisor& by) {  // of numbers only
  const F64 near = sum.high * by.reciprocal;
  return near + (remainder(sum.high, near, by.value) + sum.low) * by.reciprocal;
}
// base + sum / divisor, rounded once, and what that loses.
RK_INLINE F64 moved(F64 base, F64 sum, const Divisor& by, F64& lost) {
  const F64 near = divided(sum, by), rest = remainder(sum, near, by.value);
  F64 total;
  two_sum(base, near, total, lost);
  lost = fmadd(rest, by.reciprocal, lost);
  const F64 result = total + lost;
  lost -= result - total;
  return result;
}
RK_INLINE F64 moved(F64 base, F64 sum, const Divisor& by) {
  F64 lost;
  return moved(base, sum, by, lost);
}

// The quotient of a sum of values times kRoom: finite where the values are and it is an average. A sum of an infinity
// or a NaN is itself the result.
RK_INLINE F64 grown(const DoubledSum& sum, double divisor, bool averaging) {
  const F64 plain = sum.high / divisor * (1 / kRoom), largest = splat<F64>(__DBL_MAX__);
  const F64 value = plain - plain == 0 ? divided(sum, splat<F64>(divisor)) * (1 / kRoom) : plain;
  if (!averaging) return value;
  return sum.high - sum.high == 0 ? vmax(vmin(value, largest), -largest) : value;  // weights may have been rounded up
}

// Subnormal float64 numbers take an operation a hundred times as long; within FlushedFloats, lifted ones stand in for
// them.
constexpr double kLift = 0x1p64;

RK_INLINE Simd<double>::Key size_of(F64 x) {  // without its sign: ordered as a whole number
  return reinterpret_cast<Simd<double>::Key>(x) & ~(uint64_t{1} << 63);
}
// The size of 2^-900: larger averages rest on no subnormal number.
constexpr uint64_t kTiny = uint64_t{1023 - 900} << 52;
constexpr uint64_t kWhole = uint64_t{1023 + 52} << 52;  // of 2^52

// x * kLift, exactly; of numbers below 2^959, infinities and NaN.
RK_INLINE F64 lifted(F64 x) {
  using Key = Simd<double>::Key;
  const Key size = size_of(x), sign = reinterpret_cast<Key>(x) ^ size;
  const F64 units = reinterpret_cast<F64>(size | kWhole) - 0x1p52;  // of 2^-1074, where x is subnormal
  const F64 small = reinterpret_cast<F64>(reinterpret_cast<Key>(units * 0x1p-1010) | sign);
  return size < (uint64_t{1} << 52) ? small : x * kLift;
}
// v / kLift, rounded once.
RK_INLINE F64 lowered(F64 v) {
  using Key = Simd<double>::Key;
  const Key size = size_of(v), sign = reinterpret_cast<Key>(v) ^ size;
  const F64 units = reinterpret_cast<F64>(size) * 0x1p1010 + 0x1p52;
  const F64 small = reinterpret_cast<F64>((reinterpret_cast<Key>(units) - kWhole) | sign);
  return size < (uint64_t{1023 - 958} << 52) ? small : v * (1 / kLift);
}
// What numbers there are: whether they are all 0; some subnormal; none so large that sums of lifted ones would
// overflow.
struct Liftable {
  Simd<double>::Key some = {}, small = {}, large = {};
  RK_INLINE void look(F64 x) {
    using Key = Simd<double>::Key;
    constexpr uint64_t normal = uint64_t{1} << 52, most = uint64_t{1023 + 800} << 52, infinite = uint64_t{0x7ff} << 52;
    const Key size = size_of(x);
    some |= reinterpret_cast<Key>(size != 0);
    small |= reinterpret_cast<Key>(size - 1 < normal - 1);
    large |= reinterpret_cast<Key>(size - most < infinite - most);
  }
  RK_INLINE bool zero() const { return !any_nan(reinterpret_cast<F64>(some)); }  // all bits of a lane set: a NaN
  RK_INLINE bool subnormal() const { return any_nan(reinterpret_cast<F64>(small)); }
  RK_INLINE bool liftable() const { return !zero() && !any_nan(reinterpret_cast<F64>(large)); }
};

// To as many bits as float32 and 16 bits more than need, the last one set where others are lost: what is rounded to 16
// bits next is rounded once.
RK_INLINE F64 to_odd(F64 v) {
  using Key = Simd<double>::Key;
  constexpr uint64_t last = uint64_t{1} << 40;
  const Key bits = reinterpret_cast<Key>(v);
  const Key lost = reinterpret_cast<Key>((bits & (last - 1)) != 0);
  return reinterpret_cast<F64>((bits & ~(last - 1)) | (lost & last));
}

}  // namespace RK_ISA
}  // namespace rk
