// Sorting networks in registers: the sizes there are, and what is done to values before they are sorted.
#pragma once
#include "../common/networks.h"
#include "device.cuh"

namespace rk {
namespace cuda {

__device__ __forceinline__ void exchange(float& low, float& high) {
#if defined(__CUDA_ARCH__)
  const float smaller = fminf(low, high);
  high = fmaxf(low, high);
  low = smaller;
#else
  const bool swap = high < low;
  const float smaller = swap ? high : low;
  high = swap ? low : high;
  low = smaller;
#endif
}
// One comparison and four selections: fmin and fmax of float64 are longer than that.
__device__ __forceinline__ void exchange(double& low, double& high) {
  const bool swap = high < low;
  const double smaller = swap ? high : low;
  high = swap ? low : high;
  low = smaller;
}

// N wires, pruned to the two middle ranks or for all.
template <int N, bool kMedian>
struct Network {
  static constexpr FixedNetwork<N> value{kMedian ? N / 2 - 1 : 0, kMedian ? N / 2 + 1 : N};
};

template <class Net, class C, int N, int... I>
__device__ __forceinline__ void sort_wires(C (&x)[N], std::integer_sequence<int, I...>) {
  (exchange(x[Net::value.net[I].low], x[Net::value.net[I].high]), ...);
}
template <class Net, class C, int N>
__device__ __forceinline__ void sort_wires(C (&x)[N]) {
  sort_wires<Net>(x, std::make_integer_sequence<int, Net::value.count>{});
}

// Networks of all rows are fewer than those of medians: they are larger, and a compiler takes its time for each.
using MedianSizes = std::integer_sequence<int, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64>;
using SortSizes = std::integer_sequence<int, 8, 16, 24, 32, 48, 64>;

// Rows that every use of the network of a size has: wires below are always rows.
template <int... kSizes>
constexpr int least_rows(int size, std::integer_sequence<int, kSizes...>) {
  int least = 1;
  ((kSizes < size ? least = kSizes + 1 : 0), ...);
  return least;
}

// call(std::integral_constant) for the least size that is enough for n.
template <class F, int... kSizes>
void by_size(std::integer_sequence<int, kSizes...>, int64_t n, F&& call) {
  bool found = false;
  ((!found && n <= kSizes ? (found = true, call(std::integral_constant<int, kSizes>{})) : void()), ...);
}

// How many wires are -inf so that the lower median of n values is that of all wires.
constexpr int median_pads(int size, int64_t n) { return (size - static_cast<int>(n)) / 2; }

// Stays 0 as long as all values are numbers.
__device__ __forceinline__ float checked(float x, float check) { return fmaf(x, 0.0f, check); }
__device__ __forceinline__ double checked(double x, double check) { return fma(x, 0.0, check); }

// Makes +inf of NaN, which sort alike, and counts them.
template <class C, int N>
__device__ __forceinline__ int replace_nan(C (&x)[N]) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool is_nan = x[i] != x[i];
    count += is_nan;
    x[i] = is_nan ? infinity<C>() : x[i];
  }
  return count;
}

}  // namespace cuda
}  // namespace rk
