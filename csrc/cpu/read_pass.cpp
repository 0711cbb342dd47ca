// Compiled once per instruction set: the yardstick of every benchmark, one streaming sum over the rows.
#include "team.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {

// 16 KiB of every row in turn, which memory likes as well as whole rows; blocks of columns are split among the threads.
uint64_t read_pass(const Rows& rows, int threads) {
  typedef uint64_t Words __attribute__((vector_size(RK_VECTOR_BYTES)));
  typedef uint64_t Unaligned __attribute__((vector_size(RK_VECTOR_BYTES), aligned(1), may_alias));
  constexpr int64_t kRun = 16384, kStreams = 4, kStep = kStreams * RK_VECTOR_BYTES;
  const int64_t item = item_size(rows.dtype);
  uint64_t total = 0;
  in_threads(threads, [&](const Member& member) {
    Words sum[kStreams] = {};
    uint64_t rest = 0;
    for (int64_t s = 0; s < rows.n_segments; ++s) {
      const int64_t bytes = (rows.offsets[s + 1] - rows.offsets[s]) * item;
      const int64_t runs = (bytes + kRun - 1) / kRun;
      const int64_t first = runs * member.thread / member.threads, last = runs * (member.thread + 1) / member.threads;
      for (int64_t begin = first * kRun; begin < last * kRun; begin += kRun)
        for (int64_t i = 0; i < rows.n; ++i) {
          const char* row = static_cast<const char*>(rows.data[s * rows.n + i]);
          const int64_t end = min64(begin + kRun, bytes);
          int64_t j = begin;
          for (; j + kStep <= end; j += kStep)
#pragma GCC unroll 4
            for (int64_t v = 0; v < kStreams; ++v)
              sum[v] += *reinterpret_cast<const Unaligned*>(row + j + v * RK_VECTOR_BYTES);
          for (; j < end; j += 8) {
            uint64_t word = 0;
            memcpy(&word, row + j, static_cast<size_t>(min64(8, end - j)));
            rest += word;
          }
        }
    }
    for (int64_t v = 0; v < kStreams; ++v)
      for (unsigned lane = 0; lane < RK_VECTOR_BYTES / 8; ++lane) rest += sum[v][lane];
    __atomic_fetch_add(&total, rest, __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace RK_ISA
}  // namespace rk
