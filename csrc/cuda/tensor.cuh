// Tensor instructions for float64: data centres' GPUs have fast ones from A100 on.
#pragma once
#include "device.cuh"

// Kernels that use them have bodies only in the code of such GPUs, and in the emulation; see has_fast_doubles.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1100)
#define RK_TENSOR_CODE 1
#else
#define RK_TENSOR_CODE 0
#endif

namespace rk {
namespace cuda {

constexpr int kSide = 8, kDepth = 4;  // rows and columns of an operand
constexpr int kPadding = 4;           // between rows in shared memory: the values of an operand lie in different banks

// What a thread of a warp holds of an operand: row `lane / 4`, column `lane % 4`; and of a product: row `lane / 4`,
// columns `2 * (lane % 4)` and the next. upper += a b^T, and lower += also b^T.
__device__ __forceinline__ void multiply_add(double (&upper)[2], double (&lower)[2], double a, double also, double b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
      : "d"(a), "d"(also), "d"(b));
#elif defined(__CUDA_ARCH__) && RK_TENSOR_CODE
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(upper[0]), "+d"(upper[1])
      : "d"(a), "d"(b));
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(lower[0]), "+d"(lower[1])
      : "d"(also), "d"(b));
#else
  RK_SHARED(double, held, [8][3][kWarp]);  // of every warp of a block
  double (&mine)[3][kWarp] = held[threadIdx.x / kWarp];
  const int lane = threadIdx.x % kWarp;
  mine[0][lane] = a;
  mine[1][lane] = also;
  mine[2][lane] = b;
  __syncwarp();
  for (int k = 0; k < kDepth; ++k)
    for (int p = 0; p < 2; ++p) {
      const double other = mine[2][(2 * (lane % kDepth) + p) * kDepth + k];
      upper[p] = fma(mine[0][lane / kDepth * kDepth + k], other, upper[p]);
      lower[p] = fma(mine[1][lane / kDepth * kDepth + k], other, lower[p]);
    }
  __syncwarp();
#endif
}

// The same for 8 rows.
__device__ __forceinline__ void multiply_add(double (&sum)[2], double a, double b) {
#if defined(__CUDA_ARCH__) && RK_TENSOR_CODE
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sum[0]), "+d"(sum[1])
      : "d"(a), "d"(b));
#else
  double none[2] = {0, 0};
  multiply_add(sum, none, a, 0.0, b);
#endif
}

}  // namespace cuda
}  // namespace rk
