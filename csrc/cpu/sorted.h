// How the values of a storage type are sorted: NaN as infinities, which are told apart afterwards.
#pragma once
#include "means.h"

namespace rk {
namespace RK_ISA {

// How far ahead each row is fetched: many streams defeat the hardware (10 rows of float64: 1.3 reads with 8, 1.2 so).
constexpr int kPrefetchVectors = kVectorBytes == 64 ? 16 : 8;

// What selects on one tile (select_tile).
template <class S, class C = ComputeOf<S>>
using Selector = void (*)(const Window&, const S* const*, int64_t, C*, C*, uint8_t*, Ahead&);

// How the values of a storage type are sorted: V is a vector of them, with NaN as +inf (they sort alike). A check
// gathers whether some were no numbers.
template <class S>
struct Sorted {
  using V = typename Simd<S>::V;
  using Count = typename Simd<S>::Index;

  static RK_INLINE V read(const S* p, V& check) {
    const V x = load(p);
    check = fmadd(x, V{}, check);
    return x;
  }
  static RK_INLINE bool special(V check, V other) { return any_nan(check + other); }
  static RK_INLINE V top() { return V{} + infinity<S>(); }

  // Reads all rows again, notes those that hold a NaN or Inf and counts the NaN per column.
  static __attribute__((noinline)) void patch(const S* const* src, int64_t n, int64_t at, V* patched,
                                              uint8_t* nonfinite, Count& nan_cells) {
    nan_cells = Count{};
    for (int64_t i = 0; i < n; ++i) {
      const V x = load(src[i] + at);
      const Count is_nan = x != x;
      nonfinite[i] |= any_nan(x * 0);
      patched[i] = is_nan ? top() : x;
      nan_cells -= is_nan;
    }
  }
  static RK_INLINE void store_mean(const V* sorted, int64_t lo, int64_t hi, bool narrow, S* out) {
    store_window_mean<S>(sorted, lo, hi, narrow, out);
  }
};

// The bits of a 16-bit number with those below the sign turned round where it is set are an integer in the same order.
template <class S>
struct SortedShort {
  using V = I16;
  using Count = I16;

  static RK_INLINE I16 bits(const S* p) { return *reinterpret_cast<const UnalignedI16*>(p); }
  static RK_INLINE I16 fold(I16 x) { return x ^ ((x >> 15) & 0x7fff); }
  static RK_INLINE V read(const S* p, V& check) {
    const I16 x = bits(p);
    check = vmax(check, x & 0x7fff);
    return fold(x);
  }
  static RK_INLINE bool special(V check, V other) { return any_set(vmax(check, other) >= Storage<S>::infinity); }
  static RK_INLINE V top() { return V{} + Storage<S>::infinity; }
  static __attribute__((noinline)) void patch(const S* const* src, int64_t n, int64_t at, V* patched,
                                              uint8_t* nonfinite, Count& nan_cells) {
    nan_cells = Count{};
    for (int64_t i = 0; i < n; ++i) {
      const I16 x = bits(src[i] + at), magnitude = x & 0x7fff, is_nan = magnitude > Storage<S>::infinity;
      nonfinite[i] |= any_set(magnitude >= Storage<S>::infinity);
      patched[i] = is_nan ? top() : fold(x);
      nan_cells -= is_nan;
    }
  }
  static RK_INLINE void store_mean(const V* sorted, int64_t lo, int64_t hi, bool, float* out) {
    constexpr int lanes = Simd<float>::lanes;
    F32 wide[2][kUnrolledRows];
    for (int64_t r = lo; r < hi; ++r) {
      S cells[2 * lanes];
      const I16 x = fold(sorted[r]);
      memcpy(cells, &x, sizeof(x));
      wide[0][r - lo] = load_single(cells);
      wide[1][r - lo] = load_single(cells + lanes);
    }
    store_window_mean<float>(wide[0], 0, hi - lo, true, out);
    store_window_mean<float>(wide[1], 0, hi - lo, true, out + lanes);
  }
};
template <>
struct Sorted<Half> : SortedShort<Half> {};
template <>
struct Sorted<Bfloat> : SortedShort<Bfloat> {};

// A window that reaches a NaN gives NaN, and so do nearest values of which one is a NaN.
template <class Count, class C>
__attribute__((noinline)) void spoil_nan(const Window& window, const Count& nan_cells, C* out) {
  for (int lane = 0; lane < static_cast<int>(sizeof(Count) / sizeof(nan_cells[0])); ++lane)
    if (nan_cells[lane] > window.n - max64(window.hi, window.nearest)) out[lane] = static_cast<C>(__builtin_nan(""));
}

}  // namespace RK_ISA
}  // namespace rk
