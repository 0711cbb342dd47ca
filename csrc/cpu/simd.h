// Vectors of RK_VECTOR_BYTES through the compiler's vector types, in the namespace of one instruction set.
// Only raw pointers and fixed buffers in files that include this: an inline std function compiled here could
// be the copy the linker keeps for everybody, with instructions that other machines lack.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/half.h"
#include "../kernels.h"

#define RK_INLINE inline __attribute__((always_inline))

namespace rk {
namespace RK_ISA {

constexpr int kVectorBytes = RK_VECTOR_BYTES;

template <class C>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(RK_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(RK_VECTOR_BYTES), aligned(1), may_alias));
  using IndexScalar = int32_t;
  typedef int32_t Index __attribute__((vector_size(RK_VECTOR_BYTES)));
  using KeyScalar = uint32_t;
  typedef uint32_t Key __attribute__((vector_size(RK_VECTOR_BYTES)));
  static constexpr int lanes = RK_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(RK_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(RK_VECTOR_BYTES), aligned(1), may_alias));
  using IndexScalar = int64_t;
  typedef int64_t Index __attribute__((vector_size(RK_VECTOR_BYTES)));
  using KeyScalar = uint64_t;
  typedef uint64_t Key __attribute__((vector_size(RK_VECTOR_BYTES)));
  static constexpr int lanes = RK_VECTOR_BYTES / 8;
};

using F32 = Simd<float>::V;
using F64 = Simd<double>::V;
typedef float HalfF32 __attribute__((vector_size(RK_VECTOR_BYTES / 2), aligned(1), may_alias));
constexpr int kDoubles = Simd<double>::lanes;
typedef int16_t I16 __attribute__((vector_size(RK_VECTOR_BYTES)));
typedef int16_t UnalignedI16 __attribute__((vector_size(RK_VECTOR_BYTES), aligned(1), may_alias));

// Values of a storage type in a vector.
template <class S>
constexpr int64_t kStored = RK_VECTOR_BYTES / static_cast<int64_t>(sizeof(S));

template <class C>
constexpr C infinity() {
  return static_cast<C>(__builtin_inf());
}

template <class C>
RK_INLINE typename Simd<C>::V load(const C* p) {
  return *reinterpret_cast<const typename Simd<C>::Unaligned*>(p);
}

template <class C>
RK_INLINE void store(C* p, typename Simd<C>::V v) {
  *reinterpret_cast<typename Simd<C>::Unaligned*>(p) = v;
}

// The same value in all lanes; minus zero, unlike plus zero, is no operation that the compiler must keep.
template <class V, class C>
RK_INLINE V splat(C value) {
  return value - V{};
}

// kDoubles values as float64, exactly, and back. For the generic conversion GCC 12 takes the vectors apart.
RK_INLINE F64 load_double(const double* p) { return load(p); }
RK_INLINE void store_rounded(double* p, F64 v) { store(p, v); }
#if defined(__AVX512F__)
RK_INLINE F64 load_double(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
RK_INLINE void store_rounded(float* p, F64 v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
#elif defined(__AVX2__)
RK_INLINE F64 load_double(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
RK_INLINE void store_rounded(float* p, F64 v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
#else
RK_INLINE F64 load_double(const float* p) { return __builtin_convertvector(*reinterpret_cast<const HalfF32*>(p), F64); }
RK_INLINE void store_rounded(float* p, F64 v) { *reinterpret_cast<HalfF32*>(p) = __builtin_convertvector(v, HalfF32); }
#endif

// Zeros, one register at a time: `= {}` on an array is a block operation, far slower than the few stores it replaces.
template <class V, int64_t kRows, int64_t kColumns>
RK_INLINE void clear(V (&x)[kRows][kColumns]) {
#pragma GCC unroll 8
  for (int64_t p = 0; p < kRows; ++p)
#pragma GCC unroll 8
    for (int64_t q = 0; q < kColumns; ++q) x[p][q] = V{};
}

// One value at any alignment.
template <class C>
RK_INLINE C load_scalar(const C* p) {
  C value;
  memcpy(&value, p, sizeof(C));
  return value;
}

// min and max for numbers: what they do with a NaN differs between machines, so none may come here.
#if defined(__AVX512F__)
RK_INLINE I16 vmin(I16 a, I16 b) { return I16(_mm512_min_epi16(__m512i(a), __m512i(b))); }
RK_INLINE I16 vmax(I16 a, I16 b) { return I16(_mm512_max_epi16(__m512i(a), __m512i(b))); }
RK_INLINE F32 vmin(F32 a, F32 b) { return _mm512_min_ps(a, b); }
RK_INLINE F32 vmax(F32 a, F32 b) { return _mm512_max_ps(a, b); }
RK_INLINE F64 vmin(F64 a, F64 b) { return _mm512_min_pd(a, b); }
RK_INLINE F64 vmax(F64 a, F64 b) { return _mm512_max_pd(a, b); }
RK_INLINE F64 fmadd(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
RK_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
RK_INLINE I16 vmin(I16 a, I16 b) { return I16(_mm256_min_epi16(__m256i(a), __m256i(b))); }
RK_INLINE I16 vmax(I16 a, I16 b) { return I16(_mm256_max_epi16(__m256i(a), __m256i(b))); }
RK_INLINE F32 vmin(F32 a, F32 b) { return _mm256_min_ps(a, b); }
RK_INLINE F32 vmax(F32 a, F32 b) { return _mm256_max_ps(a, b); }
RK_INLINE F64 vmin(F64 a, F64 b) { return _mm256_min_pd(a, b); }
RK_INLINE F64 vmax(F64 a, F64 b) { return _mm256_max_pd(a, b); }
RK_INLINE F64 fmadd(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
RK_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__x86_64__)
RK_INLINE I16 vmin(I16 a, I16 b) { return I16(_mm_min_epi16(__m128i(a), __m128i(b))); }
RK_INLINE I16 vmax(I16 a, I16 b) { return I16(_mm_max_epi16(__m128i(a), __m128i(b))); }
RK_INLINE F32 vmin(F32 a, F32 b) { return _mm_min_ps(a, b); }
RK_INLINE F32 vmax(F32 a, F32 b) { return _mm_max_ps(a, b); }
RK_INLINE F64 vmin(F64 a, F64 b) { return _mm_min_pd(a, b); }
RK_INLINE F64 vmax(F64 a, F64 b) { return _mm_max_pd(a, b); }
RK_INLINE F64 fmadd(F64 a, F64 b, F64 c) { return a * b + c; }
RK_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return a * b + c; }
#else
RK_INLINE I16 vmin(I16 a, I16 b) { return a < b ? a : b; }
RK_INLINE I16 vmax(I16 a, I16 b) { return a < b ? b : a; }
RK_INLINE F32 vmin(F32 a, F32 b) { return a < b ? a : b; }
RK_INLINE F32 vmax(F32 a, F32 b) { return a < b ? b : a; }
RK_INLINE F64 vmin(F64 a, F64 b) { return a < b ? a : b; }
RK_INLINE F64 vmax(F64 a, F64 b) { return a < b ? b : a; }
RK_INLINE F64 fmadd(F64 a, F64 b, F64 c) { return a * b + c; }
RK_INLINE F32 fmadd(F32 a, F32 b, F32 c) { return a * b + c; }
#endif

// True where some lane is a NaN (of a sum of 0 * x: where some x was NaN or Inf).
template <class V>
RK_INLINE bool any_nan(V v) {
  const auto unequal = v != v;
  const char* bytes = reinterpret_cast<const char*>(&unequal);
  uint64_t words[RK_VECTOR_BYTES / 8];
  memcpy(words, bytes, sizeof(words));
  uint64_t any = 0;
  for (unsigned i = 0; i < RK_VECTOR_BYTES / 8; ++i) any |= words[i];
  return any != 0;
}
#if defined(__AVX512F__)
template <>
RK_INLINE bool any_nan<F32>(F32 v) {
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
}
template <>
RK_INLINE bool any_nan<F64>(F64 v) {
  return _mm512_cmp_pd_mask(v, v, _CMP_UNORD_Q) != 0;
}
#elif defined(__AVX2__)
template <>
RK_INLINE bool any_nan<F32>(F32 v) {
  return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0;
}
template <>
RK_INLINE bool any_nan<F64>(F64 v) {
  return _mm256_movemask_pd(_mm256_cmp_pd(v, v, _CMP_UNORD_Q)) != 0;
}
#endif

// True where some lane of a comparison's result is set.
template <class M>
RK_INLINE bool any_set(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#else
  uint64_t words[RK_VECTOR_BYTES / 8], any = 0;
  memcpy(words, &mask, sizeof(words));
  for (unsigned i = 0; i < RK_VECTOR_BYTES / 8; ++i) any |= words[i];
  return any != 0;
#endif
}

// Lane by lane, for numbers: count += x < y; count += x <= y; the larger of a and x where x < y; the smaller of a and x
// where not.
#if defined(__AVX512F__)
RK_INLINE void count_less(Simd<float>::Index& count, F32 x, F32 y) {
  const __m512i c = reinterpret_cast<__m512i>(count);
  count = reinterpret_cast<Simd<float>::Index>(
      _mm512_mask_sub_epi32(c, _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), c, _mm512_set1_epi32(-1)));
}
RK_INLINE void count_less(Simd<double>::Index& count, F64 x, F64 y) {
  const __m512i c = reinterpret_cast<__m512i>(count);
  count = reinterpret_cast<Simd<double>::Index>(
      _mm512_mask_sub_epi64(c, _mm512_cmp_pd_mask(x, y, _CMP_LT_OQ), c, _mm512_set1_epi64(-1)));
}
RK_INLINE F32 max_where_less(F32 a, F32 x, F32 y) {
  return _mm512_mask_max_ps(a, _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), a, x);
}
RK_INLINE F64 max_where_less(F64 a, F64 x, F64 y) {
  return _mm512_mask_max_pd(a, _mm512_cmp_pd_mask(x, y, _CMP_LT_OQ), a, x);
}
RK_INLINE F32 min_where_not_less(F32 a, F32 x, F32 y) {
  return _mm512_mask_min_ps(a, _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ), a, x);
}
RK_INLINE F64 min_where_not_less(F64 a, F64 x, F64 y) {
  return _mm512_mask_min_pd(a, _mm512_cmp_pd_mask(x, y, _CMP_NLT_UQ), a, x);
}
#else
template <class I, class V>
RK_INLINE void count_less(I& count, V x, V y) {
  count -= reinterpret_cast<I>(x < y);
}
template <class V>
RK_INLINE V max_where_less(V a, V x, V y) {
  return vmax(a, x < y ? x : a);
}
template <class V>
RK_INLINE V min_where_not_less(V a, V x, V y) {
  return vmin(a, x < y ? a : x);
}
#endif

// Sum of the lanes, always in the same order.
RK_INLINE double sum_lanes(F64 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(v);
#elif defined(__AVX2__)
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
#else
  double sum = v[0];
  for (int i = 1; i < kDoubles; ++i) sum += v[i];
  return sum;
#endif
}

// ---- 16-bit storage -------------------------------------------------------------------------------

// What rows of a storage type are computed in.
template <class S>
struct Storage {
  using Compute = S;
};
template <>
struct Storage<Half> {
  using Compute = float;
  static constexpr int16_t infinity = 0x7c00;
};
template <>
struct Storage<Bfloat> {
  using Compute = float;
  static constexpr int16_t infinity = 0x7f80;
};

// kDoubles stored values as float64.
#if defined(__AVX512F__)
RK_INLINE F64 load_double(const Half* p) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
RK_INLINE F64 load_double(const Bfloat* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
#elif defined(__AVX2__)
RK_INLINE F64 load_double(const Half* p) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
RK_INLINE F64 load_double(const Bfloat* p) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}
#else
template <class S>
RK_INLINE F64 load_double(const S* p) {
  double values[kDoubles];
  for (int lane = 0; lane < kDoubles; ++lane) values[lane] = static_cast<double>(widen(load_scalar(p + lane)));
  return load(values);
}
#endif

// A vector of stored values as float32, and back (to nearest even; a NaN stays one).
RK_INLINE F32 load_single(const float* p) { return load(p); }
#if defined(__AVX512F__)
RK_INLINE F32 load_single(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RK_INLINE F32 load_single(const Bfloat* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
RK_INLINE void store_narrow(Half* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
RK_INLINE F32 load_single(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RK_INLINE F32 load_single(const Bfloat* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
RK_INLINE void store_narrow(Half* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class S>
RK_INLINE F32 load_single(const S* p) {
  float values[Simd<float>::lanes];
  for (int lane = 0; lane < Simd<float>::lanes; ++lane) values[lane] = widen(load_scalar(p + lane));
  return load(values);
}
RK_INLINE void store_narrow(Half* p, F32 v) {
  for (int lane = 0; lane < Simd<float>::lanes; ++lane) p[lane] = narrow(v[lane], Half{});
}
#endif
RK_INLINE void store_narrow(Bfloat* p, F32 v) {
  using Key = Simd<float>::Key;
  const Key bits = reinterpret_cast<Key>(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Key stored = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
  for (int lane = 0; lane < Simd<float>::lanes; ++lane) p[lane].bits = static_cast<uint16_t>(stored[lane]);
}

template <class S>
RK_INLINE void widen_run(const S* src, int64_t count, float* dst) {
  int64_t j = 0;
  for (; j + Simd<float>::lanes <= count; j += Simd<float>::lanes) store(dst + j, load_single(src + j));
  for (; j < count; ++j) dst[j] = widen(load_scalar(src + j));
}
RK_INLINE void widen_run(const float* src, int64_t count, float* dst) {
  memcpy(dst, src, 4 * static_cast<size_t>(count));
}
RK_INLINE void widen_run(const double* src, int64_t count, double* dst) {
  memcpy(dst, src, 8 * static_cast<size_t>(count));
}

template <class S>
RK_INLINE void narrow_run(const float* src, int64_t count, S* dst) {
  int64_t j = 0;
  for (; j + Simd<float>::lanes <= count; j += Simd<float>::lanes) store_narrow(dst + j, load(src + j));
  for (; j < count; ++j) {
    const S value = narrow(src[j], S{});
    memcpy(dst + j, &value, sizeof(S));
  }
}
RK_INLINE void narrow_run(const float* src, int64_t count, float* dst) {
  memcpy(dst, src, 4 * static_cast<size_t>(count));
}
RK_INLINE void narrow_run(const double* src, int64_t count, double* dst) {
  memcpy(dst, src, 8 * static_cast<size_t>(count));
}

}  // namespace RK_ISA
}  // namespace rk
