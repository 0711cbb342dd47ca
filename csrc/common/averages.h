// What rows of weights and their divisors tell of the weighted sums over those divisors. For the host.
// Always inline: a copy made for one instruction set must not be everybody's.
#pragma once
#include <math.h>
#include <stdint.h>

namespace rk {

// Weights and divisor are lifted by a power of two, to weights that add up to about 2^64: no product vanishes then, and
// sums of numbers times kRoom do not overflow.
struct Average {
  double lift;
  double divisor, reciprocal;  // lifted
  double whole;                // the sum of the weights over the divisor: 1 of an average
  bool averaging;              // up to the rounding of the weights the result lies between the values
};
constexpr double kRoom = 0x1p-96;

__attribute__((always_inline)) inline Average average_of(const double* weights, int64_t n, double divisor) {
  double high = 0, low = 0, size = 0;  // the sum carries what its roundings lose
  for (int64_t i = 0; i < n; ++i) {
    const double sum = high + weights[i], added = sum - high;
    low += (high - (sum - added)) + (weights[i] - added);
    high = sum;
    size += fabs(weights[i]) * 0x1p-16;  // no sum of 65535 overflows
  }
  int exponent = 0;
  (void)frexp(size, &exponent);
  const double lift = ldexp(1.0, exponent > -900 ? 48 - exponent : 948), lifted = divisor * lift;
  return {lift, lifted, 1 / lifted, (high + low) / divisor, size <= divisor * 0x1p-16 * (1 + 0x1p-40)};
}

constexpr int64_t kMostTogether = 8;

// Of n rows one that all of `count` <= kMostTogether sums take, from `first` on, with a fair share of each one's
// largest weight; n where there is none. Differences from a row of little weight, which may be far away, would lose the
// others' digits.
__attribute__((always_inline)) inline int64_t shared_row(const double* weights, int64_t n, int64_t first,
                                                         int64_t count) {
  constexpr double kFairShare = 0.25;
  double largest[kMostTogether] = {};
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < n; ++i) largest[r] = fmax(largest[r], fabs(weights[(first + r) * n + i]));
  int64_t found = n;
  double fairest = 0;  // of the sum that takes least of the row
  for (int64_t i = 0; i < n && fairest < 1; ++i) {
    double least = 1;
    for (int64_t r = 0; r < count && least > fairest; ++r)
      least = fmin(least, largest[r] > 0 ? fabs(weights[(first + r) * n + i]) / largest[r] : 0);
    if (least > fairest) fairest = least, found = i;
  }
  return fairest >= kFairShare ? found : n;
}

}  // namespace rk
