// Selection among some dozens of rows: two parts of a column's values are sorted, 16 values at a time in registers and
// then by bitonic merges that do three stages for each load and store; a value of any rank follows from the two.
#pragma once
#include "../common/networks.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {

constexpr int kSortedRun = 16;

template <class V>
RK_INLINE void exchange(V& low, V& high) {
  const V smaller = vmin(low, high);
  high = vmax(low, high);
  low = smaller;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

constexpr int kFetchEvery = 16;  // comparators

// The comparators of a constant network on values in registers.
template <class Network, bool kFetch, class V, int N, int... I>
RK_INLINE void apply(V (&x)[N], Ahead& ahead, Indices<I...>) {
  // No function for each comparator: they would take half of the compiler's time.
  ((exchange(x[Network::value.net[I].low], x[Network::value.net[I].high]),
    kFetch && I % kFetchEvery == 0 ? ahead.pair() : void()),
   ...);
}

struct RunNetwork {
  static constexpr FixedNetwork<kSortedRun> value{0, kSortedRun};
};

template <class V>
RK_INLINE void sort_run(V* x, Ahead& ahead) {
  V run[kSortedRun];
#pragma GCC unroll 16  // as a loop it would be compiled to a block copy
  for (int i = 0; i < kSortedRun; ++i) run[i] = x[i];
  apply<RunNetwork, true>(run, ahead, typename MakeIndices<RunNetwork::value.count>::type{});
#pragma GCC unroll 16
  for (int i = 0; i < kSortedRun; ++i) x[i] = run[i];
}

// Compares values kStride, kStride/2, ... apart, kStages times, in every block of 2 * kStride of the kSize values.
template <int kStages, int kStride, int kSize, class V>
RK_INLINE void half_clean(V* x, Ahead& ahead) {
  constexpr int width = 1 << kStages, step = 2 * kStride / width;
  for (int block = 0; block < kSize; block += 2 * kStride)
    for (int j = block; j < block + step; ++j) {
      ahead.pair();
      V part[width];
#pragma GCC unroll 8
      for (int k = 0; k < width; ++k) part[k] = x[j + k * step];
#pragma GCC unroll 3
      for (int apart = width / 2; apart > 0; apart /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < width; ++k)
          if (!(k & apart)) exchange(part[k], part[k + apart]);
#pragma GCC unroll 8
      for (int k = 0; k < width; ++k) x[j + k * step] = part[k];
    }
}

// The stages from kStride down to 1, at most three at a time.
template <int kStride, int kSize, class V>
RK_INLINE void clean_from(V* x, Ahead& ahead) {
  if constexpr (kStride == 1) {
    half_clean<1, 1, kSize>(x, ahead);
  } else if constexpr (kStride == 2 || kStride == 8) {
    half_clean<2, kStride, kSize>(x, ahead);
    if constexpr (kStride == 8) half_clean<2, 2, kSize>(x, ahead);
  } else if constexpr (kStride >= 4) {
    half_clean<3, kStride, kSize>(x, ahead);
    if constexpr (kStride > 4) clean_from<kStride / 8, kSize>(x, ahead);
  }
}

// Sorts the 2 * kRun values of which both halves are sorted: each value with its mirror image, then kRun/2, ... apart.
template <int kRun, class V>
RK_INLINE void merge_runs(V* x, Ahead& ahead) {
  constexpr int quarter = kRun / 4;
  for (int j = 0; j < quarter; ++j) {
    ahead.pair();
    V *low = x + j, *high = x + 2 * kRun - 1 - j, a[4], b[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      a[k] = low[k * quarter];
      b[k] = high[-k * quarter];
      exchange(a[k], b[k]);
    }
    exchange(a[0], a[2]);
    exchange(a[1], a[3]);
    exchange(b[2], b[0]);
    exchange(b[3], b[1]);
    exchange(a[0], a[1]);
    exchange(a[2], a[3]);
    exchange(b[1], b[0]);
    exchange(b[3], b[2]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      low[k * quarter] = a[k];
      high[-k * quarter] = b[k];
    }
  }
  clean_from<kRun / 8, 2 * kRun>(x, ahead);
}

template <int kSize, class V>
void sort_power(V* x, Ahead& ahead) {
  if constexpr (kSize == kSortedRun) {
    sort_run(x, ahead);
  } else {
    sort_power<kSize / 2>(x, ahead);
    sort_power<kSize / 2>(x + kSize / 2, ahead);
    merge_runs<kSize / 2>(x, ahead);
  }
}

// Sorts x[0, size); size is 16, 32, 64 or 128.
template <class V>
void sort_part(V* x, int64_t size, Ahead& ahead) {
  if (size == 16)
    sort_power<16>(x, ahead);
  else if (size == 32)
    sort_power<32>(x, ahead);
  else if (size == 64)
    sort_power<64>(x, ahead);
  else
    sort_power<128>(x, ahead);
}

constexpr int64_t kSortedRows = 256;

// How up to kSortedRows values are cut in two parts: powers of two of at least 16, the second filled up with +inf.
struct Parts {
  int64_t first = kSortedRun, second = kSortedRun;
  explicit Parts(int64_t n) {
    while (2 * first < n) first *= 2;
    while (first + second < n) second *= 2;
  }
  int64_t size() const { return first + second; }
};

// Makes one sorted run of both sorted parts, filled up to twice the first, which holds at least 32 values.
template <class V>
void join_parts(V* x, const Parts& parts, V filling, Ahead& ahead) {
  for (int64_t i = parts.size(); i < 2 * parts.first; ++i) x[i] = filling;
  if (parts.first == 32)
    merge_runs<32>(x, ahead);
  else if (parts.first == 64)
    merge_runs<64>(x, ahead);
  else
    merge_runs<128>(x, ahead);
}

// The value of rank k of two sorted parts: with i of the k + 1 smallest from `a`, it is at least the largest of those
// i and of the k + 1 - i from `b`; the true division makes it least.
template <class V>
RK_INLINE V value_of_rank(const V* a, int64_t a_size, const V* b, int64_t b_size, int64_t k) {
  const int64_t from = k + 1 > b_size ? k + 1 - b_size : 0, to = k + 1 < a_size ? k + 1 : a_size;
  V best = from == 0 ? b[k] : vmax(a[from - 1], b[k - from]), other = best;
  int64_t i = from + 1;
  for (; i + 1 <= to && i + 1 <= k; i += 2) {
    best = vmin(best, vmax(a[i - 1], b[k - i]));
    other = vmin(other, vmax(a[i], b[k - i - 1]));
  }
  for (; i <= to; ++i) best = vmin(best, i <= k ? vmax(a[i - 1], b[k - i]) : a[i - 1]);
  return vmin(best, other);
}

}  // namespace RK_ISA
}  // namespace rk
