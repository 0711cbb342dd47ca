// The 16-bit storage types: as bits, to float32 exactly, and back to the nearest even. Host and device share it.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define RK_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define RK_SHARED_INLINE inline __attribute__((always_inline))
#endif

namespace rk {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

RK_SHARED_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
RK_SHARED_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

RK_SHARED_INLINE float widen(Bfloat x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
RK_SHARED_INLINE float widen(Half x) {
  // Move exponent and mantissa into place, then multiply by 2^112: exact, subnormals included.
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return bits_to_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

RK_SHARED_INLINE Bfloat narrow(float x, Bfloat) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // stays a NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};                  // to nearest even
}
RK_SHARED_INLINE Half narrow(float x, Half) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: let float addition at 2^-24 spacing do the rounding
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace rk
