// What all kernels share: rows in tiles of columns, values of any storage type, sums over warps and blocks.
// Compiled without contraction of products and sums; where one rounding is meant, it says fma.
#pragma once
#include <cstdint>
#include <utility>

#include "../common/averages.h"
#include "../common/half.h"
#include "platform.h"

namespace rk {
namespace cuda {

constexpr int kWarp = 32;

// What rows of a storage type are computed in.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class S>
using ComputeOf = typename Compute<S>::type;

template <class T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(HUGE_VAL);
}
template <class T>
__device__ __forceinline__ T not_a_number() {
  return static_cast<T>(NAN);
}
template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == 0;
}

// ---- values --------------------------------------------------------------------------------------------

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(Bfloat x) { return widen(x); }
__device__ __forceinline__ float widened(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  return widen(x);
#endif
}

// From the compute type to the storage type S, to the nearest even.
template <class S>
__device__ __forceinline__ S narrowed(ComputeOf<S> x) {
  if constexpr (sizeof(S) == 2)
    return narrow(x, S{});
  else
    return x;
}

// From float64 to the storage type S, rounded once: what goes to 16 bits by way of float32 keeps as many bits as those
// need, the last one set where others are lost.
template <class S>
__device__ __forceinline__ S rounded(double x) {
  if constexpr (sizeof(S) == 2) {
    constexpr uint64_t kLast = uint64_t{1} << 40;
    uint64_t bits;
    memcpy(&bits, &x, 8);
    bits = (bits & ~(kLast - 1)) | (bits & (kLast - 1) ? kLast : 0);
    memcpy(&x, &bits, 8);
  }
  return narrowed<S>(static_cast<ComputeOf<S>>(x));
}

// V values of a row that are read or written at once; for V = 1 any alignment of whole values will do.
template <class S, int V>
struct alignas(V * sizeof(S)) Pack {
  S cell[V];
};

// Writes a pack at once; rows on the device lie in global memory. Compilers for 9.0 and older split a plain assignment
// into one store for each value.
template <class S, int V>
__device__ __forceinline__ void store(S* target, const Pack<S, V>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) % 8 == 0) {
    constexpr int kWords = sizeof(pack) / 4;
    uint32_t word[kWords];
    memcpy(word, pack.cell, sizeof(pack));
    const auto address = __cvta_generic_to_global(target);
    if constexpr (kWords == 2) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word[0]), "r"(word[1]) : "memory");
    } else {
#pragma unroll
      for (int k = 0; k < kWords; k += 4)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * k), "r"(word[k]), "r"(word[k + 1]),
                     "r"(word[k + 2]), "r"(word[k + 3])
                     : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<S, V>*>(target) = pack;
}
// The first `valid` of them, where they are not whole.
template <class S, int V>
__device__ __forceinline__ void store(S* target, const Pack<S, V>& pack, bool whole, int valid) {
  if (whole) {
    store(target, pack);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v < valid) target[v] = pack.cell[v];
  }
}

// ---- rows in tiles -------------------------------------------------------------------------------------

// Rows on the device, cut into tiles of columns that never cross the border of a segment; or, with tile_starts null, a
// run of columns of one segment.
struct Table {
  const void* const* data;     // (n_segments, n)
  const int64_t* offsets;      // (n_segments + 1)
  const int64_t* tile_starts;  // (n_segments + 1) tiles before each segment
  int64_t n_segments, n;
  int64_t first, columns;  // of the one segment
  int64_t n_tiles;

  template <class S>
  __device__ __forceinline__ const S* row(int64_t segment, int64_t i) const {
    return static_cast<const S*>(data[segment * n + i]);
  }
};

struct Tile {
  int64_t segment, first;
  int count;
};

__device__ __forceinline__ Tile tile_at(const Table& table, int64_t index, int width) {
  int64_t segment = 0, begin = table.first, columns = table.columns, before = 0;
  if (table.tile_starts) {
    int64_t high = table.n_segments - 1;  // the last segment whose first tile is not after this one, and has some
    while (segment < high) {
      const int64_t middle = (segment + high + 1) / 2;
      if (table.tile_starts[middle] <= index)
        segment = middle;
      else
        high = middle - 1;
    }
    begin = 0;
    columns = table.offsets[segment + 1] - table.offsets[segment];
    before = table.tile_starts[segment];
  }
  const int64_t skipped = (index - before) * width, left = columns - skipped;
  return {segment, begin + skipped, static_cast<int>(left < width ? left : width)};
}

// ---- sums that carry their rounding errors, and quotients that are rounded once ----------------------------

constexpr double kLargest = 1.7976931348623157e308;

template <class C>
__device__ __forceinline__ void two_sum(C a, C b, C& sum, C& error) {  // Knuth
  sum = a + b;
  const C virtual_b = sum - a;
  error = (a - (sum - virtual_b)) + (b - virtual_b);
}

// A sum of float64 and what its roundings lost: about 106 bits.
struct DoubledSum {
  double high, low;

  __device__ __forceinline__ void add(double more_high, double more_low) {
    double lost;
    two_sum(high, more_high, high, lost);
    low += lost + more_low;
  }
  __device__ __forceinline__ void add_product(double a, double b) {
    const double product = a * b;
    add(product, fma(a, b, -product));
  }
  __device__ __forceinline__ void add_square(double a, double b) {
    double difference, lost;
    two_sum(a, -b, difference, lost);
    const double square = difference * difference;
    add(square, fma(difference, difference, -square) + 2.0 * difference * lost);
  }
};

__device__ __forceinline__ double divided(const DoubledSum& sum, double divisor) {
  const double near = sum.high / divisor;
  return near + (fma(-near, divisor, sum.high) + sum.low) / divisor;
}
// base + sum / divisor, rounded once, and what that loses.
__device__ __forceinline__ double moved(double base, double sum, double divisor, double& lost) {
  const double near = sum / divisor, rest = fma(-near, divisor, sum);
  double total;
  two_sum(base, near, total, lost);
  lost += rest / divisor;
  const double result = total + lost;
  lost -= result - total;
  return result;
}
__device__ __forceinline__ double moved(double base, double sum, double divisor) {
  double lost;
  return moved(base, sum, divisor, lost);
}
// The quotient of a sum of values times kRoom: finite where the values are and it is an average. A sum of an infinity
// or a NaN is itself the result.
__device__ __forceinline__ double grown(const DoubledSum& sum, double divisor, bool averaging) {
  const double plain = sum.high / divisor * (1 / kRoom);
  const double value = is_finite(plain) ? divided(sum, divisor) * (1 / kRoom) : plain;
  if (is_finite(value) || !averaging || !is_finite(sum.high)) return value;
  return value < 0 ? -kLargest : kLargest;  // the weights may have been rounded up
}

// ---- flags and sums ------------------------------------------------------------------------------------

// Looks first: a row of nothing else would have an atomic on one word for each of its values.
__device__ __forceinline__ void set_flag(unsigned* flags, int64_t row) {
#if defined(__CUDA_ARCH__)
  if (*static_cast<volatile unsigned*>(flags + row)) return;
#endif
  atomicOr(flags + row, 1u);
}

// The sum over a warp, in lane 0.
__device__ __forceinline__ double warp_sum(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  return x;
}

// partial[i] += squared distance of row i of a tile to a centre in shared memory; every warp has rows of its own, so
// that the order of the sums is fixed. All threads of a block call it.
template <class S>
__device__ __forceinline__ void add_sq_distances(const Table& rows, const Tile& tile, const double* centre,
                                                 double scale, double* partial) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int64_t i = threadIdx.x / kWarp; i < rows.n; i += warps) {
    const S* x = rows.row<S>(tile.segment, i) + tile.first;
    double sum = 0;
    for (int c = lane; c < tile.count; c += kWarp) {
      const double difference = (static_cast<double>(widened(x[c])) - centre[c]) * scale;
      sum = fma(difference, difference, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[i] += sum;
  }
}

}  // namespace cuda
}  // namespace rk
