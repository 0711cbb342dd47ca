// The floating-point state that the kernels' arithmetic rests on, for as long as an object lives, in one thread. It is
// the thread's, and others change it: torch.set_flush_denormal, or any library built with -ffast-math that is loaded.
#pragma once
#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

// Always inlined: a copy of its own could be the one of another instruction set.
#define RK_ALWAYS_INLINE inline __attribute__((always_inline))

namespace rk {

class UsualFloats {
 public:
#if defined(__SSE__)
  RK_ALWAYS_INLINE UsualFloats() : before_(_mm_getcsr()) {
    if ((before_ & ~kFlags) != kUsual) _mm_setcsr(kUsual);
  }
  RK_ALWAYS_INLINE ~UsualFloats() {
    if ((before_ & ~kFlags) != kUsual) _mm_setcsr(before_);
  }

 private:
  // Rounds to nearest, keeps subnormal numbers, raises nothing; the low bits are what has happened so far.
  static constexpr unsigned kUsual = 0x1f80, kFlags = 0x3f;
  unsigned before_;
#elif defined(__aarch64__)
  RK_ALWAYS_INLINE UsualFloats() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    if (before_) __asm__ volatile("msr fpcr, %0" ::"r"(std::uint64_t{0}));
  }
  RK_ALWAYS_INLINE ~UsualFloats() {
    if (before_) __asm__ volatile("msr fpcr, %0" ::"r"(before_));
  }

 private:
  std::uint64_t before_;
#else
  RK_ALWAYS_INLINE UsualFloats() {}
#endif

 public:
  UsualFloats(const UsualFloats&) = delete;
  UsualFloats& operator=(const UsualFloats&) = delete;
};

// Subnormal numbers count as 0, in one thread within the usual state, for sums in which they tell nothing: each
// operation with one takes a hundred times as long, and anybody may send them.
class FlushedFloats {
 public:
#if defined(__SSE__)
  RK_ALWAYS_INLINE explicit FlushedFloats(bool flushed) : before_(_mm_getcsr()) {
    if (flushed) _mm_setcsr(before_ | kFlush);
  }
  RK_ALWAYS_INLINE ~FlushedFloats() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlush = 0x8040;  // of results, and of operands
  unsigned before_;
#elif defined(__aarch64__)
  RK_ALWAYS_INLINE explicit FlushedFloats(bool flushed) {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    if (flushed) __asm__ volatile("msr fpcr, %0" ::"r"(before_ | std::uint64_t{1} << 24));
  }
  RK_ALWAYS_INLINE ~FlushedFloats() { __asm__ volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  std::uint64_t before_;
#else
  RK_ALWAYS_INLINE explicit FlushedFloats(bool) {}
#endif

 public:
  FlushedFloats(const FlushedFloats&) = delete;
  FlushedFloats& operator=(const FlushedFloats&) = delete;
};

}  // namespace rk

#undef RK_ALWAYS_INLINE
