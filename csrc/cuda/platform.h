// What kernel sources include: CUDA, or its emulation on the CPU (RK_EMULATED). The only place where the two differ.
#pragma once
#ifdef RK_EMULATED
#include "../emulation/emulation.h"
#else
#include <cuda_runtime.h>

// RK_SHARED(float, tile, [32][33]); an array of the block.
#define RK_SHARED(T, name, extents) __shared__ T name extents
// RK_DYNAMIC_SHARED(float, values); the bytes given at the launch.
#define RK_DYNAMIC_SHARED(T, name)                                          \
  extern __shared__ __align__(16) unsigned char rk_dynamic_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(rk_dynamic_shared_memory)

#ifdef __CUDACC__
namespace rk {
namespace cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(args converted to its parameters).
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args... args) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(args)...);
  // clang-format on
}

}  // namespace cuda
}  // namespace rk
#endif
#endif
