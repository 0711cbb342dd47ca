// Kernels with one fault each, and the same kernels without it: does the emulation see them? faults NAME right|wrong
// prints what came out; "faults all right" runs every right form.
#include <stdio.h>
#include <string.h>

#include "../../csrc/cuda/platform.h"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xFFFFFFFFu;

// Each reads in[0 .. kThreads) = 1, 2, ... and writes out[0 .. kThreads) = 64, 63, ... unless said otherwise.

__global__ void block_barrier(const float* in, float* out, bool wrong) {
  RK_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = in[threadIdx.x];
  if (!wrong) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// A second barrier is missing: who is ahead overwrites what others still read.
__global__ void second_barrier(const float* in, float* out, bool wrong) {
  RK_SHARED(float, value, [1]);
  for (unsigned i = 0; i < kThreads; ++i) {
    if (threadIdx.x == i) value[0] = in[i];
    __syncthreads();
    if (threadIdx.x == kThreads - 1 - i) out[threadIdx.x] = value[0];
    if (!wrong) __syncthreads();
  }
}

__global__ void warp_barrier(const float* in, float* out, bool wrong) {
  RK_SHARED(float, values, [kThreads]);
  values[threadIdx.x ^ 31] = in[threadIdx.x];
  if (!wrong) __syncwarp();
  out[(kThreads - 1 - threadIdx.x) ^ 31] = values[threadIdx.x];
}

// Shuffles exchange values but order no memory.
__global__ void shuffle_as_barrier(const float* in, float* out, bool wrong) {
  RK_SHARED(float, values, [kThreads]);
  const unsigned target = kThreads - 1 - threadIdx.x;
  values[target] = __shfl_xor_sync(kAll, in[threadIdx.x], 31);
  if (!wrong)
    __syncwarp();
  else
    __shfl_sync(kAll, 0, 0);
  out[target] = values[target ^ 31];
}

__global__ void global_read(const float* in, float* out, bool wrong) {
  const float next = in[threadIdx.x + wrong];
  out[kThreads - 1 - threadIdx.x] = wrong ? next - 1 : next;
}

__global__ void global_write(const float* in, float* out, bool wrong) {
  out[kThreads - 1 - threadIdx.x] = in[threadIdx.x];
  if (wrong) out[kThreads + threadIdx.x] = 0;
}

__global__ void shared_write(const float* in, float* out, bool wrong) {
  RK_SHARED(float, values, [kThreads]);
  RK_SHARED(float, others, [kThreads]);
  float* const shifted = values + wrong;  // through a pointer: the compiler does not know the array
  others[threadIdx.x] = 0;
  shifted[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[kThreads - 1 - threadIdx.x] = shifted[threadIdx.x] + others[threadIdx.x];
}

__global__ void dynamic_shared_write(const float* in, float* out, bool wrong) {
  RK_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + wrong] = in[threadIdx.x];
  __syncthreads();
  out[kThreads - 1 - threadIdx.x] = values[threadIdx.x + wrong];
}

// The block that runs first leaves the address of its shared memory to the other one.
__global__ void shared_of_another_block(const float* in, float* out, bool wrong) {
  RK_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (blockIdx.x == 0) out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  if (threadIdx.x != 0) return;
  unsigned long long* const kept = reinterpret_cast<unsigned long long*>(out + kThreads);
  const unsigned long long other = atomicCAS(kept, 0, reinterpret_cast<unsigned long long>(&values[0]));
  if (other != 0 && wrong) out[kThreads + 2] = *reinterpret_cast<float*>(other);
}

__global__ void uninitialised_shared(const float* in, float* out, bool wrong) {
  RK_SHARED(float, values, [kThreads]);
  if (threadIdx.x != 5 || !wrong) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[kThreads - 1 - threadIdx.x] = values[threadIdx.x];
}

__global__ void misaligned_load(const float* in, float* out, bool wrong) {
  if (threadIdx.x >= kThreads / 4) return;
  const int shift = wrong && threadIdx.x < kThreads / 4 - 1;
  const float4 value = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + shift);
  const float values[4] = {value.x, value.y, value.z, value.w};
  for (unsigned i = 0; i < 4; ++i) out[kThreads - 1 - (4 * threadIdx.x + i)] = values[i] - static_cast<float>(shift);
}

// In some threads only.
__global__ void divergent_barrier(const float* in, float* out, bool wrong) {
  out[kThreads - 1 - threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < kThreads / 2 || !wrong) __syncthreads();
}

__global__ void barriers_in_branches(const float* in, float* out, bool wrong) {
  out[kThreads - 1 - threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < kThreads / 2 || !wrong)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void divergent_shuffle(const float* in, float* out, bool wrong) {
  const float value = in[threadIdx.x];
  out[kThreads - 1 - threadIdx.x] = value;
  if (threadIdx.x % 32 < 8 || !wrong) out[kThreads - 1 - threadIdx.x] = __shfl_sync(kAll, value, threadIdx.x % 32);
}

__global__ void shuffles_in_branches(const float* in, float* out, bool wrong) {
  const int lane = threadIdx.x % 32;
  if (lane < 8 || !wrong)
    out[kThreads - 1 - threadIdx.x] = __shfl_sync(kAll, in[threadIdx.x], lane);
  else
    out[kThreads - 1 - threadIdx.x] = __shfl_sync(kAll, in[threadIdx.x], lane);
}

__global__ void lane_not_in_mask(const float* in, float* out, bool wrong) {
  const unsigned low = 0xFFFFu, mine = threadIdx.x % 32 < 16 || wrong ? low : ~low;
  out[kThreads - 1 - threadIdx.x] = __shfl_xor_sync(mine, __shfl_xor_sync(mine, in[threadIdx.x], 1), 1);
}

__global__ void deadlock(const float* in, float* out, bool wrong) {
  out[kThreads - 1 - threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x % 32 == 0 || !wrong) __syncwarp();
  __syncthreads();
}

// out[0] += 1 in every thread of every block; out[1 ..] as above.
__global__ void racing_add(const float* in, float* out, bool wrong) {
  if (blockIdx.x == 0 && threadIdx.x != kThreads - 1) out[kThreads - 1 - threadIdx.x] = in[threadIdx.x];
  if (wrong)
    out[0] += 1;
  else
    atomicAdd(out, 1.0f);
}

// The same place in each block, one thread each: a race between blocks, which barriers do not order.
__global__ void racing_blocks(const float* in, float* out, bool wrong) {
  __syncthreads();
  if (blockIdx.x == 0 || wrong) out[kThreads - 1 - threadIdx.x] = in[threadIdx.x];
  __syncthreads();
}

// The last block to take a ticket reads what the others wrote.
__global__ void last_block(const float* in, float* out, bool wrong) {
  RK_SHARED(bool, last, [1]);
  float* const kept = out + kThreads;
  unsigned* const tickets = reinterpret_cast<unsigned*>(kept + kThreads);
  if (blockIdx.x == 0) kept[threadIdx.x] = in[threadIdx.x];
  if (!wrong) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = atomicAdd(tickets, 1) == gridDim.x - 1;
    if (!wrong) __threadfence();
  }
  __syncthreads();
  if (last[0]) out[kThreads - 1 - threadIdx.x] = kept[threadIdx.x];
}

struct Case {
  const char* name;
  void (*kernel)(const float*, float*, bool);
  unsigned blocks;
};
#define CASE(kernel, blocks) {#kernel, kernel, blocks}
const Case kCases[] = {
    CASE(block_barrier, 1),
    CASE(second_barrier, 1),
    CASE(warp_barrier, 1),
    CASE(shuffle_as_barrier, 1),
    CASE(global_read, 1),
    CASE(global_write, 1),
    CASE(shared_write, 1),
    CASE(dynamic_shared_write, 1),
    CASE(shared_of_another_block, 2),
    CASE(uninitialised_shared, 1),
    CASE(misaligned_load, 1),
    CASE(divergent_barrier, 1),
    CASE(barriers_in_branches, 1),
    CASE(divergent_shuffle, 1),
    CASE(shuffles_in_branches, 1),
    CASE(lane_not_in_mask, 1),
    CASE(deadlock, 1),
    CASE(racing_add, 2),
    CASE(racing_blocks, 2),
    CASE(last_block, 2),
};

bool run(const Case& chosen, bool wrong) {
  // Some kernels keep things behind their results; where nothing may be, the allocation ends.
  const bool keeps = chosen.kernel == last_block || chosen.kernel == shared_of_another_block;
  float *in, *out, given[kThreads], got[kThreads];
  for (int i = 0; i < kThreads; ++i) given[i] = static_cast<float>(i + 1);
  const size_t bytes = sizeof given * (keeps ? 3 : 1);
  cudaMalloc(&in, sizeof given);
  cudaMalloc(&out, bytes);
  cudaMemcpyAsync(in, given, sizeof given, cudaMemcpyHostToDevice, nullptr);
  cudaMemsetAsync(out, 0, bytes, nullptr);
  rk::cuda::launch(chosen.kernel, chosen.blocks, kThreads, sizeof given, nullptr, in, out, wrong);
  const cudaError_t error = cudaGetLastError();
  cudaMemcpyAsync(got, out, sizeof given, cudaMemcpyDeviceToHost, nullptr);
  cudaFree(in);
  cudaFree(out);
  if (error != cudaSuccess) {
    printf("%s: %s: %s\n", chosen.name, cudaGetErrorName(error), rk::emulation::last_failure());
    return false;
  }
  for (int i = 0; i < kThreads; ++i) {
    const float expected = chosen.kernel == racing_add && i == 0 ? 2.0f * kThreads : given[kThreads - 1 - i];
    if (got[i] == expected) continue;
    printf("%s: wrong result: out[%d] is %g, not %g\n", chosen.name, i, got[i], expected);
    return false;
  }
  printf("%s: right\n", chosen.name);
  return true;
}

}  // namespace

int main(int count, char** args) {
  if (count != 3) return 2;
  bool all_right = true;
  for (const Case& one : kCases) {
    if (strcmp(args[1], "all") == 0 || strcmp(args[1], one.name) == 0)
      all_right &= run(one, strcmp(args[2], "wrong") == 0);
  }
  return all_right ? 0 : 1;
}
