// What the emulation does where CUDA says what happens. Prints every expectation that fails; "all right" if none does.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include "../../csrc/cuda/platform.h"

namespace {

using rk::cuda::launch;

constexpr unsigned kAll = 0xFFFFFFFFu;
int failures = 0;

bool contains(const char* text, const char* part) { return strstr(text, part) != nullptr; }

#define EXPECT(condition)                                            \
  do {                                                               \
    if (!(condition)) {                                              \
      printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                    \
    }                                                                \
  } while (false)

// --- indices and order

__global__ void number_threads(unsigned* out, unsigned* turn) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = atomicAdd(turn, 1);
}

std::vector<unsigned> turns(dim3 grid, dim3 block) {
  std::vector<unsigned> out(grid.x * grid.y * grid.z * block.x * block.y * block.z, ~0u);
  unsigned turn = 0;
  launch(number_threads, grid, block, 0, nullptr, out.data(), &turn);
  EXPECT(cudaGetLastError() == cudaSuccess && turn == out.size());
  return out;
}

void check_indices_and_order() {
  const char* given = getenv("RK_EMULATION_ORDER");
  const int order = given ? given[0] - '0' : 0;
  const dim3 grid(3, 2, 5), block(5, 7, 2);
  const std::vector<unsigned> initial = turns(grid, block);
  rk::emulation::set_order(rk::emulation::forward);
  const std::vector<unsigned> forward = turns(grid, block);
  rk::emulation::set_order(rk::emulation::backward);
  const std::vector<unsigned> backward = turns(grid, block);
  rk::emulation::set_order(rk::emulation::shuffled);
  const std::vector<unsigned> shuffled = turns(grid, block);
  const unsigned count = static_cast<unsigned>(forward.size());
  std::vector<bool> seen(count);
  for (unsigned i = 0; i < count; ++i) {
    EXPECT(forward[i] == i);
    EXPECT(backward[i] == count - 1 - i);
    EXPECT(shuffled[i] < count && !seen[shuffled[i]]);
    seen[shuffled[i]] = true;
  }
  EXPECT(shuffled != forward && shuffled != backward);
  EXPECT(turns(grid, block) == shuffled);
  EXPECT(initial == (order == 0 ? forward : order == 1 ? backward : shuffled));
  rk::emulation::set_order(order);
}

__global__ void nothing() {}

void check_threads_that_never_wait_are_not_switched() {
  rk::emulation::stats = {};
  launch(nothing, 7, 96, 0, nullptr);
  EXPECT(cudaGetLastError() == cudaSuccess);
  EXPECT(rk::emulation::stats.grids == 1 && rk::emulation::stats.blocks == 7 && rk::emulation::stats.threads == 7 * 96);
#ifndef __SANITIZE_THREAD__
  EXPECT(rk::emulation::stats.switches == 7 * 2);
#endif
}

// --- warp primitives

template <class T>
__global__ void shuffle(T* out, int kind, int argument, int width) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T value = static_cast<T>(threadIdx.x * 1.5 + 1);
  T got = 0;
  if (kind == 0) got = __shfl_sync(kAll, value, lane + argument, width);
  if (kind == 1) got = __shfl_up_sync(kAll, value, argument, width);
  if (kind == 2) got = __shfl_down_sync(kAll, value, argument, width);
  if (kind == 3) got = __shfl_xor_sync(kAll, value, argument, width);
  out[threadIdx.x] = got;
}

template <class T>
void check_shuffles_of() {
  for (int kind = 0; kind < 4; ++kind) {
    for (int width = 1; width <= 32; width *= 2) {
      for (int argument : std::vector<int>{0, 1, 2, 5, 16, 31}) {
        T out[64];
        launch(shuffle<T>, 1, 64, 0, nullptr, out, kind, argument, width);
        EXPECT(cudaGetLastError() == cudaSuccess);
        for (int i = 0; i < 64; ++i) {
          // As in the programming guide: out of the segment means one's own value.
          const int lane = i % 32, begin = lane / width * width, end = begin + width;
          int from = lane;
          if (kind == 0) from = begin + (lane + argument) % width;
          if (kind == 1 && lane - argument >= begin) from = lane - argument;
          if (kind == 2 && lane + argument < end) from = lane + argument;
          if (kind == 3 && (lane ^ argument) < end) from = lane ^ argument;
          EXPECT(out[i] == static_cast<T>((i - lane + from) * 1.5 + 1));
        }
      }
    }
  }
}

// Halves of a warp by themselves, lanes in pairs that overlap, and a source outside the mask.
__global__ void masks(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  int sum = lane;
  for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(half, sum, step);
  int passed = 1;  // from lane to lane: each waits for the one before while the one after waits for it
  for (int i = 0; i < 31; ++i) {
    if (lane != i && lane != i + 1) continue;
    const int got = __shfl_sync(3u << i, passed, i);
    if (lane == i + 1) passed = got + 1;
  }
  out[lane] = sum;
  out[32 + lane] = passed;
  out[64 + lane] = __shfl_sync(half, lane, 16);
}

__global__ void votes(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  out[threadIdx.x] = __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u && __any_sync(kAll, lane == 7) &&
                     !__any_sync(kAll, 0) && __all_sync(kAll, lane < 32) && !__all_sync(kAll, lane != 7) &&
                     __syncthreads_count(threadIdx.x < 5) == 5 && __syncthreads_or(threadIdx.x == 63) &&
                     !__syncthreads_or(0) && __syncthreads_count(1) == static_cast<int>(blockDim.x);
}

__global__ void mask_of_16(int* out, unsigned mask) { out[threadIdx.x] = __shfl_sync(mask, 3, 0); }
__global__ void width_of_12(int* out) { out[threadIdx.x] = __shfl_sync(kAll, 3, 0, 12); }

void check_warp_primitives() {
  check_shuffles_of<int>();
  check_shuffles_of<unsigned>();
  check_shuffles_of<float>();
  check_shuffles_of<double>();
  check_shuffles_of<unsigned long long>();
  int out[96] = {};
  launch(masks, 1, 32, 0, nullptr, out);
  EXPECT(cudaGetLastError() == cudaSuccess);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT(out[lane] == (lane < 16 ? 120 : 376));
    EXPECT(out[32 + lane] == lane + 1);
    EXPECT(out[64 + lane] == (lane < 16 ? -1 : 16));
  }
  launch(votes, 1, 64, 0, nullptr, out);
  EXPECT(cudaGetLastError() == cudaSuccess);
  for (int i = 0; i < 64; ++i) EXPECT(out[i] == 1);
  launch(mask_of_16, 1, 16, 0, nullptr, out, 0xFFFFu);
  EXPECT(cudaGetLastError() == cudaSuccess);
  launch(mask_of_16, 1, 16, 0, nullptr, out, kAll);
  EXPECT(cudaGetLastError() == cudaErrorLaunchFailure);
  EXPECT(contains(rk::emulation::last_failure(),
                  "lanes of the mask ffffffff have exited or do not exist, alive are 0000ffff"));
  launch(width_of_12, 1, 32, 0, nullptr, out);
  EXPECT(cudaGetLastError() == cudaErrorLaunchFailure);
  EXPECT(contains(rk::emulation::last_failure(), "the width 12 is not a power of two up to 32"));
}

// --- memory

struct Totals {
  int sum, least, most, swapped, taken;
  unsigned bits, count;
  unsigned long long wide;
  float single;
  double twice;
};

__global__ void atomics(Totals* totals, int* previous) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  previous[i] = atomicAdd(&totals->sum, 1);
  atomicMin(&totals->least, i - 50);
  atomicMax(&totals->most, i);
  atomicOr(&totals->bits, 1u << (i % 32));
  atomicAdd(&totals->count, 2);
  atomicAdd(&totals->wide, 1ull << 33);
  atomicAdd(&totals->single, 0.5f);
  atomicAdd(&totals->twice, 0.25);
  atomicExch(&totals->swapped, i);
  atomicCAS(&totals->taken, -1, i);
}

void check_atomics() {
  Totals totals = {0, 0, 0, -1, -1, 0, 0, 0, 0, 0};
  int previous[192];
  rk::emulation::stats = {};
  launch(atomics, 3, 64, 0, nullptr, &totals, previous);
  EXPECT(cudaGetLastError() == cudaSuccess);
  EXPECT(rk::emulation::stats.atomics == 192 * 10);
  EXPECT(totals.sum == 192 && totals.least == -50 && totals.most == 191 && totals.bits == kAll && totals.count == 384);
  EXPECT(totals.wide == 192ull << 33 && totals.single == 96 && totals.twice == 48);
  EXPECT(totals.swapped >= 0 && totals.taken >= 0);
  bool seen[192] = {};
  for (int i : previous) {
    EXPECT(i >= 0 && i < 192 && !seen[i]);
    seen[i] = true;
  }
}

__global__ void fresh_shared(int* out) {
  RK_SHARED(unsigned, words, [3][5]);
  RK_SHARED(unsigned, word, );
  RK_DYNAMIC_SHARED(unsigned, dynamic);
  const unsigned i = threadIdx.x;
  const bool fresh = words[i % 3][i % 5] == kAll && word == kAll && dynamic[i] == kAll;
  const bool aligned = reinterpret_cast<uintptr_t>(dynamic) % 16 == 0;
  __syncthreads();
  if (i < 15) words[i % 3][i % 5] = i;
  if (i == 0) word = 7;
  dynamic[i] = i;
  __syncthreads();
  out[blockIdx.x * blockDim.x + i] = fresh && aligned && words[1][4] == 4 && word == 7 && dynamic[31 - i] == 31 - i;
}

void check_shared_memory() {
  int out[96] = {};
  launch(fresh_shared, 3, 32, 32 * sizeof(unsigned), nullptr, out);
  EXPECT(cudaGetLastError() == cudaSuccess);
  for (int i : out) EXPECT(i == 1);
}

void check_device_memory() {
  size_t before, after, total;
  EXPECT(cudaMemGetInfo(&before, &total) == cudaSuccess && before == total);
  unsigned* words;
  EXPECT(cudaMalloc(&words, 40) == cudaSuccess && reinterpret_cast<uintptr_t>(words) % 256 == 0);
  for (int i = 0; i < 10; ++i) EXPECT(words[i] == kAll);
  EXPECT(cudaMemGetInfo(&after, &total) == cudaSuccess && before - after == 40);
  unsigned copied[10];
  EXPECT(cudaMemsetAsync(words, 1, 40, nullptr) == cudaSuccess);
  EXPECT(cudaMemcpyAsync(copied, words, 40, cudaMemcpyDeviceToHost, nullptr) == cudaSuccess &&
         copied[9] == 0x01010101u);
  EXPECT(cudaFree(words + 1) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue);
  EXPECT(cudaFree(words) == cudaSuccess && cudaFree(nullptr) == cudaSuccess);
  EXPECT(cudaMalloc(&words, 0) == cudaSuccess && words == nullptr);
  EXPECT(cudaMalloc(&words, total + 1) == cudaErrorMemoryAllocation && words == nullptr);
  EXPECT(cudaGetLastError() == cudaErrorMemoryAllocation);
  EXPECT(cudaMemGetInfo(&after, &total) == cudaSuccess && after == before);
}

// --- launches and errors

cudaError_t launched(void (*kernel)(), dim3 grid, dim3 block, size_t shared_bytes = 0) {
  launch(kernel, grid, block, shared_bytes, nullptr);
  return cudaGetLastError();
}

__global__ void much_shared() {
  RK_SHARED(char, bytes, [40000]);
  bytes[0] = 0;
}
__global__ void other() {}

void check_launches() {
  constexpr size_t kKiB = 1024;
  EXPECT(launched(nothing, 1, 1024) == cudaSuccess);
  EXPECT(launched(nothing, 1, dim3(16, 1, 64)) == cudaSuccess);
  EXPECT(launched(nothing, 1, 1025) == cudaErrorInvalidConfiguration);
  EXPECT(launched(nothing, 1, dim3(64, 17)) == cudaErrorInvalidConfiguration);
  EXPECT(launched(nothing, 1, dim3(1, 1, 65)) == cudaErrorInvalidConfiguration);
  EXPECT(launched(nothing, 1, dim3(65536, 65536)) == cudaErrorInvalidConfiguration);
  for (dim3 size : {dim3(0), dim3(1, 0), dim3(1, 1, 0)}) {
    EXPECT(launched(nothing, size, 1) == cudaErrorInvalidConfiguration);
    EXPECT(launched(nothing, 1, size) == cudaErrorInvalidConfiguration);
  }
  EXPECT(launched(nothing, dim3(1, 65535), 1) == cudaSuccess);
  EXPECT(launched(nothing, dim3(1, 65536), 1) == cudaErrorInvalidConfiguration);
  EXPECT(launched(nothing, dim3(1, 1, 65536), 1) == cudaErrorInvalidConfiguration);
  EXPECT(launched(nothing, 0x80000000u, 1) == cudaErrorInvalidConfiguration);

  EXPECT(launched(nothing, 1, 1, 48 * kKiB) == cudaSuccess);
  EXPECT(launched(nothing, 1, 1, 48 * kKiB + 1) == cudaErrorInvalidValue);
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  EXPECT(cudaFuncSetAttribute(nothing, most, 64 * kKiB) == cudaSuccess);
  EXPECT(launched(nothing, 1, 1, 64 * kKiB) == cudaSuccess);
  EXPECT(launched(nothing, 1, 1, 64 * kKiB + 1) == cudaErrorInvalidValue);
  EXPECT(launched(other, 1, 1, 64 * kKiB) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(nothing, most, 99 * kKiB) == cudaSuccess);
  EXPECT(launched(nothing, 1, 1, 99 * kKiB) == cudaSuccess);
  EXPECT(cudaFuncSetAttribute(nothing, most, 99 * kKiB + 1) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(nothing, most, -1) == cudaErrorInvalidValue);
  EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
  // With static memory beside it, seen when the kernel first runs and known from then on.
  EXPECT(launched(much_shared, 1, 1, 9152) == cudaSuccess);
  EXPECT(launched(much_shared, 1, 1, 9153) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(much_shared, most, 99 * kKiB) == cudaErrorInvalidValue);
  EXPECT(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
  EXPECT(cudaFuncSetAttribute(much_shared, most, 99 * kKiB - 40000) == cudaSuccess);
  EXPECT(launched(much_shared, 1, 1, 99 * kKiB - 40000) == cudaSuccess);
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 3) __syncthreads();
}

void check_errors() {
  const uint64_t before = rk::emulation::launches();
  EXPECT(launched(half_a_barrier, 2, 64) == cudaErrorLaunchFailure);
  EXPECT(
      contains(rk::emulation::last_failure(), "divergent barrier: 3 of 64 threads are there, the others have exited"));
  EXPECT(contains(rk::emulation::last_failure(), "behaviour.cu:"));
  EXPECT(cudaGetLastError() == cudaSuccess);
  launch(half_a_barrier, 2, 64, 0, nullptr);
  EXPECT(cudaPeekAtLastError() == cudaErrorLaunchFailure);
  EXPECT(cudaStreamSynchronize(nullptr) == cudaErrorLaunchFailure);
  EXPECT(cudaStreamSynchronize(nullptr) == cudaSuccess && cudaGetLastError() == cudaSuccess);
  EXPECT(launched(nothing, 1, 64) == cudaSuccess);
  check_shared_memory();  // no trace of what was abandoned
  EXPECT(rk::emulation::launches() == before + 4);

  rk::emulation::fail_launch(2, cudaErrorLaunchOutOfResources);
  unsigned turn = 0, out[1];
  launch(number_threads, 1, 1, 0, nullptr, out, &turn);
  EXPECT(cudaGetLastError() == cudaSuccess && turn == 1);
  launch(number_threads, 1, 1, 0, nullptr, out, &turn);
  EXPECT(cudaGetLastError() == cudaErrorLaunchOutOfResources && turn == 1);
  launch(number_threads, 1, 1, 0, nullptr, out, &turn);
  EXPECT(cudaGetLastError() == cudaSuccess && turn == 2);

  EXPECT(strcmp(cudaGetErrorName(cudaErrorLaunchFailure), "cudaErrorLaunchFailure") == 0);
  EXPECT(strcmp(cudaGetErrorString(cudaErrorLaunchFailure), "unspecified launch failure") == 0);
  EXPECT(strcmp(cudaGetErrorString(cudaErrorInvalidConfiguration), "invalid configuration argument") == 0);
  EXPECT(strcmp(cudaGetErrorName(static_cast<cudaError_t>(77)), "unrecognized error code") == 0);
}

void check_device() {
  int count = 0, device = -1, value = 0;
  EXPECT(cudaGetDeviceCount(&count) == cudaSuccess && count == 1);
  EXPECT(cudaSetDevice(0) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 0);
  EXPECT(cudaSetDevice(1) == cudaErrorInvalidDevice && cudaSetDevice(-1) == cudaErrorInvalidDevice);
  EXPECT(cudaGetLastError() == cudaErrorInvalidDevice);
  cudaDeviceProp properties;
  EXPECT(cudaGetDeviceProperties(&properties, 0) == cudaSuccess && strcmp(properties.name, "emulated") == 0);
  EXPECT(properties.major == 9 && properties.minor == 0 && properties.sharedMemPerBlockOptin == 101376);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 4);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && value == 101376);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && value == 9);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1) == cudaErrorInvalidDevice);
  EXPECT(cudaGetLastError() == cudaErrorInvalidDevice);
  EXPECT(cudaRuntimeGetVersion(&value) == cudaSuccess && value == 13000);
  EXPECT(cudaDriverGetVersion(&value) == cudaSuccess && value == 13000);
}

// --- host threads: a grid at a time, each with its own errors

__global__ void add_in_turn(int* total) {
  RK_SHARED(int, sum, );
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1);
  __syncthreads();
  if (threadIdx.x == 0) *total += sum;
}

void check_host_threads() {
  int totals[2] = {0, 0};
  cudaError_t errors[2];
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&totals, &errors, t] {
      for (int i = 0; i < 20; ++i) launch(add_in_turn, 1, 64, 0, nullptr, &totals[t]);
      if (t == 1) launch(half_a_barrier, 1, 64, 0, nullptr);
      errors[t] = cudaGetLastError();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(totals[0] == 20 * 64 && totals[1] == 20 * 64);
  EXPECT(errors[0] == cudaSuccess && errors[1] == cudaErrorLaunchFailure && cudaGetLastError() == cudaSuccess);
}

// --- intrinsics, types, conversions of arguments

__global__ void __launch_bounds__(32) intrinsics(int* out, float f, double d, const float* __restrict__ in) {
  int wrong = 0;
  wrong += __popc(0xF0F0u) != 8;
  wrong += __clz(1) != 31 || __clz(0) != 32 || __clz(-1) != 0;
  wrong += __ffs(0) != 0 || __ffs(8) != 4;
  wrong += __float_as_int(-0.0f) != -2147483647 - 1 || __float_as_uint(1.0f) != 0x3F800000u;
  wrong += __int_as_float(0x3F800000) != 1 || __uint_as_float(0x40000000u) != 2;
  wrong += __longlong_as_double(__double_as_longlong(d)) != d;
  // 1 + 2^-12 squared is not a float: the product is rounded before the sum unless fused.
  wrong += __fadd_rn(__fmul_rn(f, f), -1.0f) == fmaf(f, f, -1.0f) || fma(f, f, -1.0f) != fmaf(f, f, -1.0f);
  wrong += __dadd_rn(__dmul_rn(d, d), 1.0) != d * d + 1.0;
  wrong += __ldg(in) != 5;
#pragma unroll
  for (int i = 0; i < 4; ++i) wrong += make_int4(1, 2, 3, 4).z != 3;
  *out = wrong;
}

void check_intrinsics() {
  static_assert(sizeof(float2) == 8 && alignof(float2) == 8 && alignof(float4) == 16 && alignof(double2) == 16, "");
  static_assert(alignof(int2) == 8 && alignof(uint4) == 16 && alignof(ushort2) == 4 && alignof(ushort4) == 8, "");
  static_assert(sizeof(ulonglong2) == 16 && alignof(ulonglong2) == 16 && sizeof(dim3) == 12, "");
  int out = -1;
  float in = 5;
  launch(intrinsics, 1, 1, 0, nullptr, &out, 1.000244140625, 3, &in);
  EXPECT(cudaGetLastError() == cudaSuccess && out == 0);
}

}  // namespace

int main() {
  check_indices_and_order();
  check_threads_that_never_wait_are_not_switched();
  check_warp_primitives();
  check_atomics();
  check_shared_memory();
  check_device_memory();
  check_launches();
  check_errors();
  check_device();
  check_host_threads();
  check_intrinsics();
  if (failures == 0) printf("all right\n");
  return failures != 0;
}
